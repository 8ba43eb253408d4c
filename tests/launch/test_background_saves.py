"""Saves beside training on two ranks of a real run."""

import json
import os
from pathlib import Path

import launching
from launching import finish, write_config

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.verification import checkpoint_damage

WORKER = Path(__file__).with_name("saving_worker.py")
# As the worker has them.
FAILING_STEP = 4
STOPPED_STEP = 8


def test_two_ranks_save_beside_training_through_a_failure_and_a_stop(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        tiny_data,
        training={"max_steps": 100, "eval_steps": None},
        checkpoint={"save_steps": 2, "keep_last": 10, "save_mode": "async"},
    )
    command = launching.torchrun_command(config)
    place = command.index(launching.TRAIN)
    done = finish([*command[:place], str(WORKER), str(config), str(tmp_path)])
    run_dir = tmp_path / "run"
    assert committed_steps(run_dir) == [2, 6, STOPPED_STEP, STOPPED_STEP + 1], done.stderr
    assert len(os.listdir(run_dir / "checkpoints")) == 4

    noted = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for step in committed_steps(run_dir):
        folder = checkpoint_folder(run_dir, step)
        manifest = read_manifest(folder)
        assert list(checkpoint_damage(folder, manifest)) == []
        written = [
            [f.name, f.start, f.master_sha256, f.exp_avg_sha256, f.exp_avg_sq_sha256]
            for f in manifest.fragments
        ]
        assert written == noted[0][str(step)] + noted[1][str(step)]

    staging = f"step-{FAILING_STEP:08d}.partial: checkpoint not written"
    assert f"{staging} ([Errno 28] No space left on device)" in done.stderr
    assert f"for the save of step {STOPPED_STEP} to be written" in done.stderr
    assert f"stopped by a stop of another rank after step {STOPPED_STEP + 1}" in done.stderr
