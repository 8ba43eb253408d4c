"""Scans whose results are kept for their recomputation: run once, with the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_kernels import launch_emulated
from op_comparison import assert_identical, leaves, output_gradients, packed, random_tensor
from scan_cases import scan_arguments
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.selective_scan import cpu as scan_cpu
from mamba_dist.ops.selective_scan import gpu as scan_gpu
from mamba_dist.ops.selective_scan import gpu_launch, selective_scan
from mamba_dist.ops.ssd import cpu as ssd_cpu
from mamba_dist.ops.ssd import gpu as ssd_gpu
from mamba_dist.ops.ssd import ssd

LENGTH = 70
PER_POSITION = {"u", "x", "delta", "dt", "B", "C", "z"}
Op = Callable[..., Any]


class FakeTriton:
    """What `triton_launch` offers, with results that tell the inputs apart; counts the forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, *arguments: Any) -> None:
        x, dt, *_, y, final_state = arguments
        self.forwards += 1
        y.copy_(x * dt.unsqueeze(-1))
        final_state.fill_(1)

    def backward(self, *arguments: Any) -> None:
        *inputs, _, _, grad_y, _, gradients = arguments
        tensors = (tensor for tensor in inputs if tensor is not None)
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        for gradient, tensor in zip(gradients, floating, strict=True):
            gradient.copy_(tensor * grad_y.abs().sum())


def ssd_arguments() -> dict[str, Any]:
    heads, headdim, d_state = 4, 16, 16
    return {
        "x": random_tensor(2, LENGTH, heads, headdim, seed=1),
        "dt": random_tensor(2, LENGTH, heads, seed=2),
        "A": -torch.exp(random_tensor(heads, seed=3)),
        "B": random_tensor(2, LENGTH, 1, d_state, seed=4),
        "C": random_tensor(2, LENGTH, 1, d_state, seed=5),
        "D": random_tensor(heads, seed=6),
        "dt_bias": random_tensor(heads, seed=8) - 2,
        "dt_softplus": True,
        "initial_state": random_tensor(2, heads, headdim, d_state, seed=9),
        "seq_idx": packed(LENGTH),
    }


def arguments_of(op: Op) -> dict[str, Any]:
    if op is ssd:
        return ssd_arguments()
    return scan_arguments(length=LENGTH, channels=16, d_state=16, seq_idx=packed(LENGTH))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Op, str], int]:
    """How often the forward kernel of an op and backend ran; the GPU's run on the CPU."""
    counts = {}
    names = {scan_cpu: "_run_forward", scan_gpu: "run_forward", ssd_cpu: "_run_forward"}
    for module, name in names.items():
        original = getattr(module, name)

        def count(*arguments: Any, module: Any = module, run: Any = original) -> Any:
            counts[module] = counts.get(module, 0) + 1
            return run(*arguments)

        monkeypatch.setattr(module, name, count)
    triton = FakeTriton()
    monkeypatch.setattr(gpu_launch, "launch", launch_emulated)
    monkeypatch.setattr(ssd_gpu, "require_triton", lambda: triton)
    modules = {(selective_scan, "cpu"): scan_cpu, (selective_scan, "gpu"): scan_gpu}
    modules[ssd, "cpu"] = ssd_cpu

    def of(op: Op, backend: str) -> int:
        if (op, backend) == (ssd, "gpu"):
            return triton.forwards
        return counts.get(modules[op, backend], 0)

    return of


def results(
    op: Op, arguments: dict[str, Any], *, backwards: int = 1, **options: Any
) -> dict[str, Tensor]:
    """y and all gradients of a region that is recomputed for each backward."""
    inputs = leaves(arguments, torch.bfloat16, PER_POSITION)

    def region(*values: Any) -> Any:
        named = dict(zip(inputs, values, strict=True))
        first = next(iter(named))
        return op(**named | {first: named[first].tanh()}, **options)

    y = checkpoint(region, *inputs.values(), use_reentrant=False)
    for left in reversed(range(backwards)):
        for value in inputs.values():
            if isinstance(value, Tensor):
                value.grad = None
        y.backward(output_gradients(y, y)[0], retain_graph=left > 0)
    gradients = {
        f"d {n}": v.grad for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad
    }
    return {"y": y.detach()} | gradients


CASES = [(op, backend) for op in (selective_scan, ssd) for backend in ("cpu", "gpu")]
every_case = pytest.mark.parametrize(("op", "backend"), CASES)


@every_case
def test_a_recomputation_does_not_scan_again_and_changes_no_bit(
    op: Op, backend: str, runs: Callable[[Op, str], int]
) -> None:
    arguments = arguments_of(op)
    plain = results(op, arguments, backend=backend)
    before = runs(op, backend)
    found = results(op, arguments, backend=backend, kept=KeptScan())
    assert runs(op, backend) - before == 1
    assert_identical(found, plain)
    assert len(plain) == len([v for v in arguments.values() if isinstance(v, Tensor)])


@every_case
def test_every_backward_of_one_forward_takes_the_kept_results(
    op: Op, backend: str, runs: Callable[[Op, str], int]
) -> None:
    arguments = arguments_of(op)
    plain = results(op, arguments, backend=backend)
    before = runs(op, backend)
    found = results(op, arguments, backwards=2, backend=backend, kept=KeptScan())
    assert runs(op, backend) - before == 1
    assert_identical(found, plain)


@pytest.mark.parametrize(("channels", "d_state", "scans"), [(12, 16, 2), (16, 20, 4)])
def test_a_gpu_scan_that_would_keep_more_than_its_output_runs_again(
    channels: int, d_state: int, scans: int, runs: Callable[[Op, str], int]
) -> None:
    seq_idx = packed(9) if d_state == 16 else None
    arguments = scan_arguments(length=9, channels=channels, d_state=d_state, seq_idx=seq_idx)
    plain = results(selective_scan, arguments, backend="gpu")
    before = runs(selective_scan, "gpu")
    kept = KeptScan()
    found = results(selective_scan, arguments, backend="gpu", kept=kept)
    assert runs(selective_scan, "gpu") - before == scans
    assert_identical(found, plain)


@every_case
def test_without_a_gradient_nothing_is_kept(
    op: Op, backend: str, runs: Callable[[Op, str], int]
) -> None:
    inputs, kept = leaves(arguments_of(op), torch.bfloat16, PER_POSITION), KeptScan()
    for number in (1, 2):
        with torch.no_grad():
            op(**inputs, backend=backend, kept=kept)
        assert runs(op, backend) == number


@pytest.mark.parametrize("op", [selective_scan, ssd])
def test_a_final_state_that_would_be_lost_is_refused(op: Op) -> None:
    with pytest.raises(ValueError, match="return_final_state is True"):
        op(**arguments_of(op), return_final_state=True, kept=KeptScan())
