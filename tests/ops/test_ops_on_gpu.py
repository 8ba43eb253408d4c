"""The backends of each op on a GPU against the float64 reference on the CPU."""

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

from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.backend import describe_backends
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# On chunk borders and off them, of one position, and with rows of one document.
SEQ_IDX = {
    200: document_ids([63, 2, 1, 134], [200]),
    2100: document_ids([1, 255, 256, 1, 1535, 52], [2048, 52]),
}

every_case = [
    pytest.mark.parametrize("backend", ["torch", "cuda"]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16]),
    pytest.mark.parametrize("with_documents", [False, True]),
    pytest.mark.parametrize("with_options", [False, True]),
    pytest.mark.parametrize("length", [1, 200, 2100]),
]


def in_every_case(test: Any) -> Any:
    for mark in every_case:
        test = mark(test)
    return test


def documents(length: int, *, wanted: bool) -> torch.Tensor | None:
    return SEQ_IDX[length] if wanted and length > 1 else None


def on_gpu(arguments: Arguments) -> Arguments:
    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to("cuda").requires_grad_(value.requires_grad)

    return {name: move(value) for name, value in arguments.items()}


def assert_gpu_agrees(
    op: Op,
    arguments: Arguments,
    *,
    backend: str,
    dtype: torch.dtype,
    low_precision: set[str],
    **options: Any,
) -> None:
    (status,) = (s for s in describe_backends("cuda") if s.name == backend)
    if not status.available:
        pytest.skip(status.detail)
    inputs = leaves(arguments, dtype, low_precision)
    truth = run(op, leaves(inputs, torch.float64, set()), backend="reference", **options)
    # Twice: a kernel may tune itself in its first run.
    for repetition in range(2):
        found = run(op, on_gpu(inputs), backend=backend, **options)
        for name, value in truth.items():
            error = relative_error(found[name].cpu(), value)
            limit = tolerance(dtype, device_type="cuda")
            assert error < limit, f"{name}: {error:.1e} in run {repetition}"


@in_every_case
def test_selective_scan(
    length: int, with_options: bool, with_documents: bool, dtype: torch.dtype, backend: str
) -> None:
    arguments = {
        "u": random_tensor(2, length, 32, seed=1),
        "delta": random_tensor(2, length, 32, seed=2).abs() * 0.3,
        "A": -torch.exp(random_tensor(32, 16, seed=3)),
        "B": random_tensor(2, length, 2, 16, seed=4),
        "C": random_tensor(2, length, 2, 16, seed=5),
        "seq_idx": documents(length, wanted=with_documents),
    }
    if with_options:
        arguments |= {
            "delta": random_tensor(2, length, 32, seed=2),
            "D": random_tensor(32, seed=6),
            "z": random_tensor(2, length, 32, seed=7),
            "delta_bias": random_tensor(32, seed=8) - 2,
            "delta_softplus": True,
            "initial_state": random_tensor(2, 32, 16, seed=9),
        }
    low_precision = {"u", "delta", "B", "C", "z"}
    assert_gpu_agrees(
        selective_scan, arguments, backend=backend, dtype=dtype, low_precision=low_precision
    )


@in_every_case
def test_ssd(
    length: int, with_options: bool, with_documents: bool, dtype: torch.dtype, backend: str
) -> None:
    arguments = {
        "x": random_tensor(2, length, 4, 16, seed=1),
        "dt": random_tensor(2, length, 4, seed=2).abs() * 0.3,
        "A": -torch.exp(random_tensor(4, seed=3)),
        "B": random_tensor(2, length, 2, 16, seed=4),
        "C": random_tensor(2, length, 2, 16, seed=5),
        "seq_idx": documents(length, wanted=with_documents),
    }
    if with_options:
        arguments |= {
            "dt": random_tensor(2, length, 4, seed=2),
            "D": random_tensor(4, seed=6),
            "z": random_tensor(2, length, 4, 16, seed=7),
            "dt_bias": random_tensor(4, seed=8) - 2,
            "dt_softplus": True,
            "initial_state": random_tensor(2, 4, 16, 16, seed=9),
        }
    low_precision = {"x", "dt", "B", "C", "z"}
    assert_gpu_agrees(ssd, arguments, backend=backend, dtype=dtype, low_precision=low_precision)


@in_every_case
def test_causal_conv1d(
    length: int, with_options: bool, with_documents: bool, dtype: torch.dtype, backend: str
) -> None:
    arguments = {
        "x": random_tensor(2, length, 32, seed=1),
        "weight": random_tensor(32, 4, seed=2),
        "seq_idx": documents(length, wanted=with_documents),
    }
    if with_options:
        state = random_tensor(2, 32, 3, seed=4)
        arguments |= {
            "bias": random_tensor(32, seed=3),
            # What a run in bf16 leaves behind; other states are rounded to it.
            "initial_state": state.bfloat16().double() if dtype == torch.bfloat16 else state,
            "activation": "silu",
        }
    assert_gpu_agrees(causal_conv1d, arguments, backend=backend, dtype=dtype, low_precision={"x"})


@pytest.mark.parametrize("chunk_size", [64, 100, 256])
def test_ssd_of_mamba_2_shapes(chunk_size: int) -> None:
    arguments = {
        "x": random_tensor(1, 600, 4, 64, seed=1),
        "dt": random_tensor(1, 600, 4, seed=2),
        "A": -torch.exp(random_tensor(4, seed=3)),
        "B": random_tensor(1, 600, 1, 128, seed=4),
        "C": random_tensor(1, 600, 1, 128, seed=5),
        "dt_bias": random_tensor(4, seed=8) - 4,
        "dt_softplus": True,
        "seq_idx": document_ids([100, 300, 200]),
    }
    assert_gpu_agrees(
        ssd,
        arguments,
        backend="cuda",
        dtype=torch.float32,
        low_precision=set(),
        chunk_size=chunk_size,
    )


def test_cross_entropy() -> None:
    hidden = random_tensor(2, 200, 32, seed=1).requires_grad_()
    weight = random_tensor(64, 32, seed=2).requires_grad_()
    labels = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(3))
    truth = linear_cross_entropy(hidden, weight, labels, vocab_size=60, backend="reference")
    truth.backward()
    moved = [t.detach().float().cuda().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*moved, labels.cuda(), vocab_size=60)
    loss.backward()
    limit = tolerance(torch.float32, device_type="cuda")
    assert relative_error(loss.cpu(), truth) < limit
    for found, expected in zip(moved, (hidden, weight), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert relative_error(found.grad.cpu(), expected.grad) < limit
