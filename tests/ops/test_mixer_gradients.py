"""Mamba-1's mixer on the GPU's kernels: no gradient is moved or added by itself, and none changes.

Mamba-2's kernels need Triton's interpreter, see `ssd_gpu_worker.py`.
"""

from collections.abc import Iterator

import pytest
import torch
from mixer_gradients import CHECKPOINTING, MOVES, emulated, gradients, placements, plain
from op_comparison import assert_identical, relative_error
from torch import Tensor

from mamba_dist.ops.agreement import tolerance


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
def test_a_backward_moves_and_adds_no_large_gradient(checkpointing: str, autocast: bool) -> None:
    _, operators = gradients("mamba1", checkpointing=checkpointing, autocast=autocast)
    assert not MOVES & operators.keys(), operators
    with plain(sums=True):
        _, operators = gradients("mamba1", checkpointing=checkpointing, autocast=autocast)
    assert MOVES & operators.keys() == {"cat", "add"}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_second_backward_of_one_forward_gives_the_same(checkpointing: str) -> None:
    once, _ = gradients("mamba1", checkpointing=checkpointing)
    twice, operators = gradients("mamba1", checkpointing=checkpointing, backwards=2)
    assert_identical(twice, once)
    assert not MOVES & operators.keys(), operators


def test_a_gradient_that_the_product_adds_onto_is_that_of_autograd() -> None:
    found, _ = gradients("mamba1")
    with plain(sums=True):
        expected, _ = gradients("mamba1")
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient.double()) <= tolerance(torch.float32), name


def test_in_bf16_it_is_as_far_from_fp32_as_that_of_autograd() -> None:
    exact, _ = gradients("mamba1")
    found, _ = gradients("mamba1", autocast=True)
    with plain(sums=True):
        expected, _ = gradients("mamba1", autocast=True)

    def deviation(results: dict[str, Tensor], name: str) -> Tensor:
        return (results[name] - exact[name]).norm() / exact[name].norm()

    for name in exact:
        # Of 1 %, all other roundings; by how much they happen to cancel varies by 1 % of that.
        assert deviation(found, name) <= 1.03 * deviation(expected, name), name
