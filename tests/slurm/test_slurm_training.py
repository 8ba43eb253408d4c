"""launch/submit.py and launch/slurm/train.sbatch under a real scheduler, with real ranks."""

import json
from pathlib import Path

from local_slurm import LocalSlurm
from submitting import submit
from tiny_run import write_config


def test_a_job_lives_through_a_killed_rank_and_a_signal_and_trains_as_if_undisturbed(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    configs = [
        write_config(
            tmp_path / name,
            tiny_data,
            training={"max_steps": 20, "eval_steps": None},
            checkpoint={"save_steps": 5},
        )
        for name in ("disturbed", "calm")
    ]
    steps = {"STEP_S": "0.15"}
    job = submit(slurm, configs[0], "--time=30", "--requeue", **steps, KILL_AT="7:0")
    calm = submit(slurm, configs[1], "--time=30", **steps)
    # What is edited after the submission is not what the job trains.
    configs[0].write_text("nothing: of use")
    job.wait_for_requeue()
    assert "a rank was ended by signal 9" in job.log()
    job.wait_for_step(12)
    # As SLURM sends it before the limit, which it looks at twice a minute only.
    slurm.call("scancel", "--signal=USR1", job.id)
    job.wait_for_requeue()
    stopped_at = job.checkpoints()[-1]
    assert 12 <= stopped_at < 20
    assert job.finish() == "COMPLETED", job.log()
    assert calm.finish() == "COMPLETED", calm.log()
    assert job.losses() == calm.losses()
    assert sorted(job.losses()) == list(range(1, 21))
    assert f"newest checkpoint of step {stopped_at}" in job.log()
    assert "start 3 of job" in job.log()
    assert "start 2 of job" not in calm.log()
    account = json.loads((job.submission / "submit.json").read_text())
    assert account["job"] == job.id
