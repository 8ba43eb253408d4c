"""The torch backend of each op on a GPU against the float64 reference on the CPU."""

from typing import Any

import pytest
import torch
from op_comparison import (
    Arguments,
    Op,
    document_ids,
    leaves,
    random_tensor,
    relative_error,
    run,
)

from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SEQ_IDX = document_ids([63, 2, 135], [200])


def on_gpu(arguments: Arguments) -> Arguments:
    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to("cuda").requires_grad_(value.requires_grad)

    return {name: move(value) for name, value in arguments.items()}


def assert_gpu_agrees(op: Op, arguments: Arguments) -> None:
    inputs = leaves(arguments, torch.float32, set())
    truth = run(op, leaves(inputs, torch.float64, set()), backend="reference")
    for repetition in range(2):
        found = {n: v.cpu() for n, v in run(op, on_gpu(inputs), backend="torch").items()}
        for name, value in truth.items():
            error = relative_error(found[name], value)
            # A GPU's sums run in another order and its matmuls in other tiles than the CPU's.
            assert error < 1e-5, f"{name}: {error:.1e} in run {repetition}"


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
def test_selective_scan(seq_idx: torch.Tensor | None) -> None:
    arguments = {
        "u": random_tensor(2, 200, 32, seed=1),
        "delta": random_tensor(2, 200, 32, seed=2),
        "A": -torch.exp(random_tensor(32, 16, seed=3)),
        "B": random_tensor(2, 200, 2, 16, seed=4),
        "C": random_tensor(2, 200, 2, 16, seed=5),
        "D": random_tensor(32, seed=6),
        "z": random_tensor(2, 200, 32, seed=7),
        "delta_bias": random_tensor(32, seed=8) - 2,
        "delta_softplus": True,
        "seq_idx": seq_idx,
        "initial_state": random_tensor(2, 32, 16, seed=9),
    }
    assert_gpu_agrees(selective_scan, arguments)


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
def test_ssd(seq_idx: torch.Tensor | None) -> None:
    arguments = {
        "x": random_tensor(2, 200, 4, 16, seed=1),
        "dt": random_tensor(2, 200, 4, seed=2),
        "A": -torch.exp(random_tensor(4, seed=3)),
        "B": random_tensor(2, 200, 2, 16, seed=4),
        "C": random_tensor(2, 200, 2, 16, seed=5),
        "D": random_tensor(4, seed=6),
        "dt_bias": random_tensor(4, seed=8) - 2,
        "dt_softplus": True,
        "seq_idx": seq_idx,
        "initial_state": random_tensor(2, 4, 16, 16, seed=9),
    }
    assert_gpu_agrees(ssd, arguments)


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX])
def test_causal_conv1d(seq_idx: torch.Tensor | None) -> None:
    arguments = {
        "x": random_tensor(2, 200, 32, seed=1),
        "weight": random_tensor(32, 4, seed=2),
        "bias": random_tensor(32, seed=3),
        "seq_idx": seq_idx,
        "initial_state": random_tensor(2, 32, 3, seed=4),
        "activation": "silu",
    }
    assert_gpu_agrees(causal_conv1d, arguments)


def test_cross_entropy() -> None:
    hidden = random_tensor(2, 200, 32, seed=1).requires_grad_()
    weight = random_tensor(64, 32, seed=2).requires_grad_()
    labels = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(3))
    truth = linear_cross_entropy(hidden, weight, labels, vocab_size=60, backend="reference")
    truth.backward()
    moved = [t.detach().float().cuda().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*moved, labels.cuda(), vocab_size=60)
    loss.backward()
    assert relative_error(loss.cpu(), truth) < 1e-5
    for found, expected in zip(moved, (hidden, weight), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert relative_error(found.grad.cpu(), expected.grad) < 1e-5
