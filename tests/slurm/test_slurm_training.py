"""launch/submit.py and launch/slurm/train.sbatch under a real scheduler, with real ranks."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from local_slurm import LocalSlurm
from namespaces import why_no_nodes
from submitting import submit
from tiny_run import write_config

STEPS = 20


def config_in(folder: Path, made: Path, *, steps: int = STEPS, save_steps: int = 5) -> Path:
    return write_config(
        folder,
        made,
        model={"d_model": 32, "n_layers": 1},
        training={"max_steps": steps, "eval_steps": None},
        checkpoint={"save_steps": save_steps},
    )


def test_a_job_lives_through_a_killed_rank_and_a_signal_and_trains_as_if_undisturbed(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path / "disturbed job #1", tiny_data)
    words = ("--nodes=2", "--ranks-per-node=1", "--time=30", "--requeue")
    job = submit(slurm, config, *words, STEP_S="0.15", KILL_AT="7:0")
    # Beside it, on a node that it has, too.
    calm = submit(slurm, config_in(tmp_path / "calm", tiny_data), "--time=30", STEP_S="0.15")
    # What is edited after the submission is not what the job trains.
    config.write_text("nothing: of use")
    job.wait_for_requeue()
    assert "a rank was ended by signal 9" in job.log()
    job.wait_for_step(12)
    # As SLURM sends it before the limit, which it looks at twice a minute only.
    slurm.call("scancel", "--signal=USR1", job.id)
    job.wait_for_requeue()
    stopped_at = job.checkpoints()[-1]
    assert 12 <= stopped_at < STEPS
    assert job.finish() == "COMPLETED", job.log()
    assert calm.finish() == "COMPLETED", calm.log()
    assert job.losses() == calm.losses()
    assert sorted(job.losses()) == list(range(1, STEPS + 1))
    assert f"newest checkpoint of step {stopped_at}" in job.log()
    assert (job.starts(), calm.starts()) == (3, 1)
    # The traceback of the rank that the killed one left behind.
    assert f'File "{job.submission}/code/mamba_dist/train/loop.py"' in job.log()
    assert json.loads((job.submission / "submit.json").read_text())["job"] == job.id


def test_a_mistake_ends_a_job_that_was_not_checked_before(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data)
    small = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
    job = slurm.submit(
        f"--output={tmp_path}/job.log",
        *("--time=30", f"--export=ALL,MAMBA_DIST_PYTHON={sys.executable}", *small),
        *("launch/slurm/train.sbatch", "--config", config, "training.micro_batch_sise=3"),
    )
    assert slurm.wait(job)[job] == {"FAILED"}
    log = (tmp_path / "job.log").read_text()
    assert log.count(f" of job {job} on ") == 1
    assert "micro_batch_sise" in log


@pytest.mark.slow
def test_a_time_limit_too_short_for_the_steps_is_no_hindrance(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    # SLURM signals up to a minute early; the first start hears nothing of it, and is cut off.
    steps, words = 150, ("--time=3", "--stop-before=60", "--requeue")
    config = config_in(tmp_path / "short", tiny_data, steps=steps)
    job = submit(slurm, config, *words, STEP_S="1.2", SLEEP_AT="6:0")
    calm = submit(slurm, config_in(tmp_path / "long", tiny_data, steps=steps), "--time=30")
    # First, since SLURM forgets jobs that have ended.
    assert calm.finish() == "COMPLETED", calm.log()
    assert job.finish(timeout_s=1200) == "COMPLETED", job.log()
    assert job.starts() >= 3
    assert "DUE TO TIME LIMIT" in job.log()
    assert "stopped by SIGUSR1" in job.log()
    assert job.losses() == calm.losses()
    assert sorted(job.losses()) == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_job_lives_through_a_requeue_and_a_preemption_and_ends_when_cancelled(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, steps=10_000, save_steps=5_000)
    job = submit(slurm, config, "--time=30", "--requeue", STEP_S="0.15")
    job.wait_for_step(4)
    slurm.call("scontrol", "requeue", job.id)
    job.wait_for_requeue()
    [first] = job.checkpoints()
    job.wait_for_step(first + 4)
    everything = ("--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = slurm.submit("--partition=urgent", *everything, "--wrap=sleep 1")
    job.wait_for_requeue()
    assert slurm.wait(urgent) == {urgent: {"COMPLETED"}}
    second = job.checkpoints()[-1]
    assert second >= first + 4
    assert job.log().count("SLURM ended the job, and starts it again or not") == 2
    job.wait_for_step(second + 4)
    slurm.call("scancel", job.id)
    # Its ranks leave with the code that means "continue", and still nothing starts it again.
    assert job.finish() == "CANCELLED"
    assert job.checkpoints()[-1] >= second + 4
    assert job.starts() == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["of the job script", "another"])
def test_a_job_lives_through_the_failure_of_a_node(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path, number: int
) -> None:
    if not slurm.nodes:
        pytest.skip(str(why_no_nodes()))
    node = slurm.nodes[number]
    words = ("--nodes=2", "--ranks-per-node=1", "--time=30", "--requeue")
    config = config_in(tmp_path / "disturbed", tiny_data)
    job = submit(slurm, config, *words, STEP_S="0.5")
    job.wait_for_step(7)
    node.fail()
    # SLURM misses the node after a minute (SlurmdTimeout).
    job.wait_until(lambda: slurm.states(job.id) == {"PENDING"}, "its requeue", 200)
    slurm.restart(node)
    assert job.finish(timeout_s=200) == "COMPLETED", job.log()
    assert job.starts() == 2
    assert "newest checkpoint of step 5" in job.log()
    calm = submit(slurm, config_in(tmp_path / "calm", tiny_data), *words)
    assert calm.finish() == "COMPLETED", calm.log()
    assert job.losses() == calm.losses()
    assert sorted(job.losses()) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_rank_that_is_killed_at_the_same_step_again_and_again_ends_the_job(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    job = submit(slurm, config_in(tmp_path, tiny_data), "--time=30", "--requeue", KILL_AT="7")
    assert job.finish(timeout_s=250) == "FAILED"
    assert job.checkpoints() == [5]
    # One that made a checkpoint, and three that did not.
    assert job.starts() == 4, job.log()
    assert "not started again: the last 3 starts made no new checkpoint" in job.log()


@pytest.mark.slow
def test_a_mistake_that_only_the_ranks_find_is_not_repeated(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data / "shards", tmp_path / "made" / "shards")
    shutil.copy(tiny_data / "tokenizer.json", tmp_path / "made")
    config = config_in(tmp_path / "job", tmp_path / "made")
    job = submit(slurm, config, "--time=30", "--requeue", "--sbatch-option=--hold")
    shutil.rmtree(tmp_path / "made")
    slurm.call("scontrol", "release", job.id)
    assert job.finish() == "FAILED"
    assert job.starts() == 1
    assert "not started again: a mistake that the log above explains" in job.log()


@pytest.mark.slow
def test_a_job_that_is_not_to_start_again_says_how_to_go_on(
    slurm: LocalSlurm, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_in(tmp_path, tiny_data, steps=10_000, save_steps=5_000)
    job = submit(slurm, config, "--time=30", STEP_S="0.15")
    job.wait_for_step(3)
    slurm.call("scancel", "--signal=USR1", job.id)
    assert job.finish() == "FAILED"
    assert job.starts() == 1
    assert "not started again: it was submitted without --requeue" in job.log()
