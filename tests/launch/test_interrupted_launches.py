"""What a launcher makes of ranks that hang, that are interrupted, or that give up."""

import os
import re
import signal
from pathlib import Path

import launching
import pytest
from launching import begin, finish, ranks_of, wait_until, write_config

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.telemetry.metrics import read_metrics
from mamba_dist.telemetry.starts import read_starts
from mamba_dist.train.stop import EXIT_STOPPED

START_S = 90
COMMANDS = {
    "deepspeed": launching.deepspeed_command,
    "torchrun": launching.torchrun_command,
}
SMALL = {"d_model": 32, "n_layers": 1}
both_launchers = pytest.mark.parametrize(
    "launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)]
)


def long_run(folder: Path, made: Path) -> Path:
    return write_config(
        folder,
        made,
        model=SMALL,
        training={"max_steps": 100_000, "eval_steps": None},
        engine={"hang_timeout_minutes": 3 / 60},
        checkpoint={"save_steps": 50_000},
    )


def wait_for_steps(run_dir: Path) -> None:
    wait_until(lambda: len(read_metrics(run_dir)) >= 2, timeout_s=START_S, what="two steps")


# The watchdog itself: tests/train/test_watchdog.py.
@pytest.mark.slow
def test_a_stopped_rank_ends_the_launch_with_the_stacks_of_all_and_start_me_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = long_run(tmp_path, tiny_data)
    process = begin(launching.deepspeed_command(config), tmp_path / "log")
    wait_for_steps(tmp_path / "run")
    os.kill(max(ranks_of(config)), signal.SIGSTOP)
    assert process.wait(timeout=60) == EXIT_STOPPED
    wait_until(lambda: not ranks_of(config), timeout_s=20, what="the end of all ranks")
    lines = (tmp_path / "log").read_text().splitlines()
    [said] = [line for line in lines if "the run hangs" in line]
    assert "is stopped by a signal" in said
    assert [start.reason for start in read_starts(tmp_path / "run")] == ["hang"]
    stacks = sorted((tmp_path / "run/hangs").glob("*/*"))
    assert [path.name for path in stacks] == ["rank-00000.txt", "rank-00001.txt"]
    for path in stacks:
        assert "mamba_dist/train/loop.py" in path.read_text()


@both_launchers
def test_a_ctrl_c_at_a_launcher_ends_in_a_checkpoint(
    tiny_data: Path, tmp_path: Path, launcher: str
) -> None:
    """A terminal sends it to the whole group; both launchers then end their ranks on their own."""
    config = long_run(tmp_path, tiny_data)
    process = begin(COMMANDS[launcher](config), tmp_path / "log")
    wait_for_steps(tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not ranks_of(config), timeout_s=40, what="the end of all ranks")
    [step] = committed_steps(tmp_path / "run")
    # The ranks get SIGINT and the launcher's SIGTERM at once, in any order.
    log = (tmp_path / "log").read_text()
    assert re.search(rf"stopped by SIG(INT|TERM) after step {step};", log)


@pytest.mark.slow
def test_training_that_stays_broken_has_an_exit_code_of_its_own(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        tiny_data,
        model=SMALL,
        training={"skip_grad_norm_above": 1e-9, "max_skipped_steps": 2},
    )
    result = finish(launching.deepspeed_command(config))
    assert result.returncode == 65
    assert "error: 2 steps in a row were skipped" in result.stderr
    assert "samples 0 to 15" in result.stderr
