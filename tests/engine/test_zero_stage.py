"""Which ZeRO stage runs, and what it keeps on each rank."""

import pytest

from mamba_dist.config.engine import EngineConfig
from mamba_dist.engine.zero_settings import stage_for, state_bytes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_runs_stage_0_and_several_the_one_that_is_asked_for(stage: int) -> None:
    config = EngineConfig(zero_stage=stage)
    assert stage_for(config, ranks=1) == 0
    assert stage_for(config, ranks=2) == stage


@pytest.mark.parametrize(
    ("stage", "ranks", "bytes_per_parameter"),
    [(0, 1, 16), (0, 4, 16), (1, 4, 8 + 2), (2, 4, 4 + 3), (3, 4, 5)],
)
def test_the_state_of_a_rank_is_what_the_stage_leaves_to_it(
    stage: int, ranks: int, bytes_per_parameter: int
) -> None:
    """fp32 parameter, gradient and two moments; at stage 3 a master copy besides."""
    assert state_bytes(1000, stage=stage, ranks=ranks) == 1000 * bytes_per_parameter
