"""tools/bench.py checkpoint: what it measures of real ranks."""

import json
from pathlib import Path

import pytest
from processes import run_script

from mamba_dist.commands.bench import main


@pytest.mark.slow
def test_two_ranks_are_measured_and_read_no_byte_twice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    done = run_script(
        *("tools/bench.py", "checkpoint", "--ranks", "2", "--rounds", "1", "--length", "8"),
        *("--d-model", "32", "--layers", "1", "--vocab", "4000"),
        *("--folder", tmp_path / "disk", "--json", tmp_path / "found.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "### Checkpoints of 2 MB, 2 ranks" in done.stdout
    assert "| bytes read over bytes stored | 1.0" in done.stdout
    [turn] = json.loads((tmp_path / "found.json").read_text())["rounds"]
    state = 3 * 4 * 4000 * 32
    assert state < turn["state_bytes"] < turn["file_bytes"] < 2 * state
    assert turn["file_bytes"] <= turn["read_bytes"]
    assert 0 < turn["waited_s"] < turn["background_s"]
    assert min(turn[name] for name in ("steps_s", "blocking_s", "dd_s", "load_s")) > 0
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_folder_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "--folder", str(tmp_path / "none")])
    assert "is no folder" in capsys.readouterr().err
