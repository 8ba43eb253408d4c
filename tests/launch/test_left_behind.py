"""What launches leave outside of their run folders, and what they find there: see also conftest.py,
which looks after each test of this folder."""

from pathlib import Path

import launching
import pytest
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from launching import finish, write_config

from mamba_dist.telemetry.starts import read_starts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_launches_in_a_row_leave_nothing_behind(tiny_data: Path, tmp_path: Path) -> None:
    """What counts is looked at after each test of this folder, see launching.surroundings."""
    config = write_config(tmp_path, tiny_data, model={"d_model": 32, "n_layers": 1})
    for steps in range(3, 23):
        length = f"training.max_steps={steps}"
        result = finish(launching.ranks_command(config, length))
        assert result.returncode == 0, result.stderr[-3000:]
    reasons = [start.reason for start in read_starts(tmp_path / "run")]
    assert reasons == 20 * ["finished"]


def test_the_locks_that_launches_meet_are_those_that_deepspeed_would_wait_for() -> None:
    assert {builder.name for builder in ALL_OPS.values()} <= set(launching.EXTENSIONS)
