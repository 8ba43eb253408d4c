"""Which ZeRO stage runs, and what each engine keeps on each rank."""

import pytest

from mamba_dist.config.engine import EngineConfig
from mamba_dist.engine.memory import ModelSize, StateBytes, stage_for, state_bytes

SIZE = ModelSize(parameters=1000, layer=10, rest=100)


def state(ranks: int, *, accumulation_steps: int = 1, **engine: object) -> StateBytes:
    config = EngineConfig.model_validate({"bucket_elements": 100, **engine})
    return state_bytes(
        SIZE, config, ranks=ranks, accumulation_steps=accumulation_steps, on_gpu=False
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_runs_stage_0_and_several_the_one_that_is_asked_for(stage: int) -> None:
    config = EngineConfig(zero_stage=stage)
    assert stage_for(config, ranks=1) == 0
    assert stage_for(config, ranks=2) == stage


@pytest.mark.parametrize(
    ("stage", "ranks", "bytes_per_parameter"),
    [(0, 1, 16), (3, 1, 16), (0, 4, 16), (1, 4, 4 + 5 + 2), (2, 4, 4 + 2 + 2), (3, 4, 5)],
)
def test_the_state_of_a_rank_is_what_the_stage_leaves_to_it(
    stage: int, ranks: int, bytes_per_parameter: int
) -> None:
    """fp32 parameter, gradient and two moments; the part's gradients once more while they are given
    to AdamW at stages 1 and 2, and a master copy at stage 3."""
    found = state(ranks, zero_stage=stage)
    assert found.certain + found.flattened == 1000 * bytes_per_parameter


@pytest.mark.parametrize(
    ("ranks", "accumulation_steps", "reshard", "carried", "whole"),
    [(1, 1, True, 0, 0), (4, 1, True, 0, 100), (4, 2, True, 4000, 100), (4, 2, False, 4000, 1000)],
)
def test_fsdp2_keeps_a_share_and_what_stays_whole(
    ranks: int, accumulation_steps: int, reshard: bool, carried: int, whole: int
) -> None:
    """fp32 parameter, gradient and two moments; gradients are whole between micro-batches."""
    found = state(
        ranks, accumulation_steps=accumulation_steps, kind="fsdp2", reshard_after_forward=reshard
    )
    assert found.parameters + found.optimizer == 12000 // ranks
    assert found.certain == 16000 // ranks
    assert found.carried_gradients == carried
    # Besides, the five layers that are gathered and reduced at once; two that are whole anyway.
    in_flight = 50 if reshard else 20
    assert found.buffers + found.whole_layers == (4 * (whole + in_flight) if ranks > 1 else 0)
