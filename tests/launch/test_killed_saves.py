"""Real ranks, killed in a save: each start goes on bit for bit from the newest whole checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import write_config
from processes import clean_environment

from mamba_dist.checkpoint.layout import checkpoint_folder
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.telemetry.metrics import read_metrics

WORKER = Path(__file__).with_name("kill_worker.py")
KILLED = -9
# What a kill at each place of the worker leaves, and where the next start goes on.
LEFT = [
    {"step-00000002.partial"},
    {"step-00000004.partial"},
    {"step-00000006"},
    {"step-00000006.removed", "step-00000008"},
]
RESUMED = [None, 4, 6, 8]
# All that it had to write stands there.
COMMITTED_BY_A_START = "step-00000004.partial"


def losses(run_dir: Path) -> dict[float | None, float | None]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


@pytest.mark.parametrize(
    "places", [(0, 3), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)], ids=str
)
def test_ranks_killed_in_a_save_go_on_bit_for_bit(
    tiny_data: Path, tmp_path: Path, places: tuple[int, ...]
) -> None:
    options = {"checkpoint": {"save_steps": 2, "keep_last": 1}}
    configs = [write_config(tmp_path / name, tiny_data, **options) for name in ("whole", "broken")]
    runs = [tmp_path / name / "run" for name in ("whole", "broken")]
    log = tmp_path / "log"
    result = subprocess.run(
        [sys.executable, str(WORKER), *map(str, configs), str(log), *map(str, places)],
        env={**clean_environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    said = log.read_text() if log.exists() else ""
    assert result.returncode == 0, result.stderr[-3000:] + said[-3000:]
    *lives, last = [json.loads(x) for x in result.stdout.splitlines() if x.startswith("{")]
    assert last == {"endings": [0, 0], "left": ["step-00000010"]}
    for place, life in zip(places, lives, strict=True):
        assert set(life["left"]) >= LEFT[place]
        if place == 2 and 1 in places:
            # The start that committed step 4 has deleted what keep_last does not keep beside it.
            assert set(life["left"]) == {"step-00000004", "step-00000006"}
        if place in (0, 2):
            # The survivor of a rank that is killed alone ends by itself, with an error.
            survivor, victim = life["endings"] if place == 0 else life["endings"][::-1]
            assert victim == KILLED
            assert survivor not in (0, KILLED)
        else:
            assert life["endings"] == [KILLED, KILLED]
        for name in LEFT[place]:
            if name == COMMITTED_BY_A_START:
                folder = runs[1] / "checkpoints" / "step-00000004"
                assert f"committed {folder}, all of which an interrupted save left" in said
            elif "." in name:
                assert f"removed {name}, which an interrupted save left behind" in said
        if RESUMED[place] is not None:
            assert f"resumed after step {RESUMED[place]} from" in said
    whole, broken = (read_manifest(checkpoint_folder(run, 10)) for run in runs)
    # The hashes of parameters and moments are among them.
    assert broken.fragments == whole.fragments
    assert broken.progress == whole.progress
    assert broken.val_loss == whole.val_loss is not None
    assert losses(runs[1]) == losses(runs[0])
