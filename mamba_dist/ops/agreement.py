"""How far an implementation of an op may be, and is, from the float64 reference.

The one table of tolerances: the tests, tools/doctor.py and tools/bench.py judge by it.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

# Largest error of an output or gradient, relative to its largest entry, by the dtype of the input.
# bf16 is half an ulp (2^-9) of an output, and as much again where rounded values are summed.
TOLERANCE: Final = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 6e-3}
)
# A GPU's sums run in another order and its matmuls in other tiles than the CPU's.
_GPU_FP32_TOLERANCE: Final = 1e-5
# A logit's rounding error is exponentiated.
_BF16_SOFTMAX_TOLERANCE: Final = 2e-2

Function = Callable[[Mapping[str, Tensor]], Tensor]
"""An op with its options bound: named inputs to its one output."""


def tolerance(
    dtype: torch.dtype, *, device_type: str = "cpu", through_softmax: bool = False
) -> float:
    """Largest `relative_error` that passes for inputs of `dtype` on a device."""
    if through_softmax and dtype == torch.bfloat16:
        return _BF16_SOFTMAX_TOLERANCE
    if device_type != "cpu" and dtype == torch.float32:
        return _GPU_FP32_TOLERANCE
    return TOLERANCE[dtype]


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest deviation over the largest entry of the truth; NaN if an entry is NaN."""
    if truth.numel() == 0:
        return 0.0
    exact = truth.detach().double().cpu()
    scale = exact.abs().max().clamp_min(1e-30)
    return float((found.detach().double().cpu() - exact).abs().max() / scale)


def true_results(reference: Function, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output "y" and the gradient "d <name>" of each floating input, in float64 on the CPU."""
    exact = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    return _results(reference, exact)


def errors(
    function: Function, inputs: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, float]:
    """`relative_error` of the output and of each gradient; `truth` is of the same inputs."""
    found = _results(function, inputs)
    return {name: relative_error(found[name], value) for name, value in truth.items()}


def worst(by_output: Mapping[str, float]) -> tuple[str, float]:
    """The output that is furthest off, and its error; NaN is further than any number."""
    name = max(by_output, key=lambda n: math.inf if math.isnan(by_output[n]) else by_output[n])
    return name, by_output[name]


def _results(function: Function, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in inputs.items()
    }
    y = function(leaves)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(y, [leaves[n] for n in names], _output_gradient(y))
    by_name = {f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {"y": y.detach(), **by_name}


def _output_gradient(y: Tensor) -> Tensor:
    """Standard normal numbers that bf16 holds exactly, so the same ones in every dtype."""
    generator = torch.Generator().manual_seed(90)
    return torch.randn(y.shape, generator=generator).bfloat16().to(y)
