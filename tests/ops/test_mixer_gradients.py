"""Mamba-1's mixer on the GPU's kernels: no gradient is moved by itself, and none changes.

Mamba-2's kernels need Triton's interpreter, see `ssd_gpu_worker.py`.
"""

from collections.abc import Iterator

import pytest
from mixer_gradients import CHECKPOINTING, MOVES, emulated, gradients, placements, plain
from op_comparison import assert_identical


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulated():
        yield


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_shared_buffers_change_no_bit(checkpointing: str, autocast: bool) -> None:
    with placements() as in_place:
        found, _ = gradients("mamba1", checkpointing=checkpointing, autocast=autocast)
    assert in_place == [True, True]
    with plain():
        expected, _ = gradients("mamba1", autocast=autocast)
    assert_identical(found, expected)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_backward_moves_no_large_gradient(checkpointing: str, autocast: bool) -> None:
    _, operators = gradients("mamba1", checkpointing=checkpointing, autocast=autocast)
    assert not MOVES & operators.keys(), operators
    with plain():
        _, operators = gradients("mamba1", checkpointing=checkpointing, autocast=autocast)
    assert MOVES & operators.keys() == {"cat"}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_second_backward_of_one_forward_gives_the_same(checkpointing: str) -> None:
    once, _ = gradients("mamba1", checkpointing=checkpointing)
    twice, operators = gradients("mamba1", checkpointing=checkpointing, backwards=2)
    assert_identical(twice, once)
    assert not MOVES & operators.keys(), operators
