"""Whether a start is refused for want of memory, and what it says."""

import pytest
from processes import ROOT

from mamba_dist.config.load import load_config
from mamba_dist.config.schema import RunConfig
from mamba_dist.train.memory import GIB, memory_plan, memory_problem


def shipped(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / f"configs/{name}.yaml", overrides).config


def problem(config: RunConfig, available: float, *, ranks: int = 1, on_host: int = 1) -> str | None:
    return memory_problem(
        config,
        ranks=ranks,
        ranks_on_host=on_host,
        on_gpu=False,
        available=int(available * GIB),
    )


def test_a_model_that_cannot_fit_is_refused_with_its_numbers() -> None:
    text = problem(shipped("1b"), 23.4)
    assert text is not None
    assert "1,372,178,432 parameters x 16 bytes" in text
    assert "ZeRO 0 on 1 rank) = 20.4 GiB a rank" in text
    assert "activations of 16 x 2,048 positions" in text
    assert "this host has 23.4 GiB free" in text
    assert "zero_stage: 3 (20 bytes a parameter, 25.6 GiB" in text
    assert "tools/plan.py" in text


def test_the_line_is_at_what_is_certain_and_not_at_the_estimate() -> None:
    config = shipped("130m", "training.micro_batch_size=1", "training.global_batch_size=1")
    plan = memory_plan(config, ranks=1, on_gpu=False)
    assert plan.certain < plan.peak
    assert problem(config, plan.certain / GIB) is None
    assert problem(config, (plan.certain - 1024) / GIB) is not None


def test_ranks_of_one_host_share_its_memory() -> None:
    config = shipped("130m", "training.micro_batch_size=1", "engine.zero_stage=3")
    certain = memory_plan(config, ranks=4, on_gpu=False).certain / GIB
    assert problem(config, 2.1 * certain, ranks=4, on_host=2) is None
    told = str(problem(config, 2.1 * certain, ranks=4, on_host=4))
    assert f"4 ranks take {4 * certain:.1f} GiB at least, and this host has" in told


@pytest.mark.parametrize("engine", [["engine.kind=fsdp2", "engine.zero_stage=null"], []])
def test_more_ranks_take_less_each(engine: list[str]) -> None:
    config = shipped("2.8b", "training.micro_batch_size=1", *engine)
    sizes = [memory_plan(config, ranks=n, on_gpu=True).peak for n in (2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
