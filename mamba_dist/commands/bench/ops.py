"""bench ops: scan, convolution and SSD, forward and backward, beside what others run on a CPU."""

from collections.abc import Container, Mapping, Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.commands.bench.cases import (
    LETTERS,
    Case,
    Op,
    our_op,
    random_inputs,
    within_reference_time,
)
from mamba_dist.commands.bench.spec import Allocator, Group, OpSpec, Row, dtype_name
from mamba_dist.ops.agreement import Function, errors, tolerance, true_results

OpName = Literal["scan", "conv", "ssd", "linear"]

VARIANTS: Final[Mapping[OpName, tuple[str, ...]]] = {
    "scan": ("cpu", "torch", "mambapy"),
    "conv": ("cpu", "torch", "nn.Conv1d"),
    "ssd": ("cpu", "torch", "hf"),
    "linear": ("cpu", "torch"),
}
OURS: Final = ("cpu", "torch")
_DESCRIPTIONS: Final = {
    "cpu": "ours, backend cpu",
    "torch": "ours, backend torch",
    "mambapy": "mamba.py",
    "nn.Conv1d": "torch's Conv1d and silu",
    "hf": "Hugging Face",
}
_OPS: Final[Mapping[OpName, Op]] = {
    "scan": "selective_scan",
    "conv": "causal_conv1d",
    "ssd": "ssd",
    "linear": "linear",
}
_SHAPES: Final[Mapping[OpName, tuple[tuple[int, ...], ...]]] = {
    "scan": ((1, 512, 512, 16), (1, 2048, 512, 16), (1, 2048, 1536, 16)),
    "conv": ((1, 512, 512, 4), (1, 2048, 1536, 4)),
    "ssd": ((1, 1024, 24, 64, 128, 1, 256), (1, 1024, 24, 64, 128, 1, 64)),
    "linear": ((2, 512, 256, 1024), (1, 2048, 768, 3072), (1, 2048, 1536, 768)),
}
# The gate asks of a peer that it computes the same function; how it rounds is its own business.
_PEER_SLACK: Final = 10
# Several variants are checked per table, one after the other.
_GATE_SHARE: Final = 0.25


def groups(
    names: Sequence[OpName],
    *,
    shape: Sequence[int] | None,
    dtypes: Sequence[torch.dtype],
    allocators: Sequence[Allocator],
    only: Container[str] | None,
) -> list[Group]:
    """What to measure: `shape` for every name if given, else the shapes that we publish.

    `only` keeps the variants that it contains.
    """
    found = [
        _group(name, Case(_OPS[name], _sizes(name, chosen), dtype, False), allocator, only)
        for name in names
        for chosen in ([shape] if shape else _SHAPES[name])
        for dtype in dtypes
        for allocator in allocators
    ]
    return [group for group in found if group.rows]


def shape_letters(name: OpName) -> str:
    """The sizes that describe one op, in their order."""
    return LETTERS[_OPS[name]]


def build_op(spec: OpSpec) -> Function:
    """A variant that needs no peer's package."""
    if spec.variant == "nn.Conv1d":
        return _torch_convolution
    return our_op(spec.case, spec.variant)


def _sizes(name: OpName, shape: Sequence[int]) -> dict[str, int]:
    return dict(zip(LETTERS[_OPS[name]], shape, strict=True))


def _group(name: OpName, case: Case, allocator: Allocator, only: Container[str] | None) -> Group:
    variants = [v for v in VARIANTS[name] if only is None or v in only]
    tokens = case.sizes["B"] * case.sizes["L"]
    return Group(
        title=f"{case}, {dtype_name(case.dtype)}, {allocator} malloc, forward and backward",
        rows=[Row(v, _DESCRIPTIONS[v], tokens) for v in variants],
        specs={v: OpSpec(v, case) for v in variants},
        allocator=allocator,
        baselines=OURS,
    )


class OpJob:
    """Forward and backward of one op on the same inputs, again and again."""

    def __init__(self, spec: OpSpec, function: Function) -> None:
        self._case = spec.case
        self._function = function
        self._bf16 = spec.case.dtype == torch.bfloat16
        self._inputs = {n: t.requires_grad_() for n, t in random_inputs(spec.case).items()}
        self._grad: Tensor | None = None
        slack = 1 if spec.variant in OURS else _PEER_SLACK
        self.allowed = slack * tolerance(spec.case.dtype)

    def step(self) -> None:
        """Output, and gradients of all inputs."""
        y = self._called(self._inputs)
        if self._grad is None:
            self._grad = torch.randn_like(y)
        torch.autograd.grad(y, list(self._inputs.values()), self._grad)

    def errors(self) -> dict[str, float] | None:
        """Against the float64 loop, at fewer steps, and fewer channels or heads if need be."""
        case = within_reference_time(self._case, share=_GATE_SHARE)
        inputs = random_inputs(case)
        return errors(self._called, inputs, true_results(our_op(case, "reference"), inputs))

    def _called(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # As in training: the others mix dtypes, which works under autocast only.
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self._function(inputs)


def _torch_convolution(x: Mapping[str, Tensor]) -> Tensor:
    """What users write: nn.Conv1d wants channels first, pads both ends, and SiLU comes after."""
    weight = x["weight"][:, None]
    channels, length = weight.shape[0], x["x"].shape[1]
    y = F.conv1d(
        x["x"].transpose(1, 2),
        weight.to(x["x"].dtype),
        x["bias"].to(x["x"].dtype),
        padding=weight.shape[2] - 1,
        groups=channels,
    )
    return F.silu(y[..., :length].transpose(1, 2))
