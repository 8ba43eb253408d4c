"""Ops at given sizes with random inputs, for measuring them and for comparing backends.

B batch, L length, E channels, N d_state, H heads, P headdim, G groups, Q chunk, K kernel width,
I and O features of a linear map, D width of the stream, V rows of the head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from mamba_dist.config.schema import MambaConfig
from mamba_dist.ops.agreement import Function
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.gated_rms_norm import gated_rms_norm
from mamba_dist.ops.linear import linear
from mamba_dist.ops.rms_norm import add_rms_norm
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

Op = Literal[
    "selective_scan",
    "ssd",
    "causal_conv1d",
    "linear",
    "add_rms_norm",
    "gated_rms_norm",
    "linear_cross_entropy",
]

LETTERS: Final[Mapping[Op, str]] = {
    "selective_scan": "BLEN",
    "ssd": "BLHPNGQ",
    "causal_conv1d": "BLEK",
    "linear": "BLIO",
    "add_rms_norm": "BLD",
    "gated_rms_norm": "BLDG",
    "linear_cross_entropy": "BLDV",
}
# Elements of all time steps' states (or logits) that the float64 loop may hold: about 2 GiB with
# what autograd keeps, and a few seconds.
_REFERENCE_ELEMENTS: Final = 1 << 25
# The same for its matrix products, forward and backward.
_REFERENCE_FLOPS: Final = 1 << 35
# The size that a product sums over.
_SUMMED: Final[Mapping[Op, str]] = {"linear": "I", "linear_cross_entropy": "D"}
# Long enough for several chunks of every backend, with a ragged end.
_SHORTEST_LENGTH: Final = 300


@dataclass(frozen=True)
class Case:
    """One op at one size.

    sizes: by the letters of the op.
    dtype: of the tensors that have a position L; parameters are fp32.
    as_in_model: with what a mixer passes along, that is gate, softplus, bias, skip and documents;
        else only what every implementation knows.
    """

    op: Op
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    as_in_model: bool = True

    def __str__(self) -> str:
        return f"{self.op} {' '.join(f'{letter}{n}' for letter, n in self.sizes.items())}"


def layer_cases(config: MambaConfig, *, batch: int, length: int, dtype: torch.dtype) -> list[Case]:
    """The ops of one layer and of the head, at the sizes of a model's config."""
    common = {"B": batch, "L": length}
    channels = config.d_inner
    projected = 2 * channels
    if config.layer == "mamba1":
        sizes = {**common, "E": channels, "N": config.d_state}
        mixer = [Case("selective_scan", sizes, dtype)]
    else:
        sizes = {
            **common,
            "H": config.n_heads,
            "P": config.headdim,
            "N": config.d_state,
            "G": config.ngroups,
            "Q": config.chunk_size,
        }
        gated = {**common, "D": channels, "G": config.ngroups}
        mixer = [Case("ssd", sizes, dtype), Case("gated_rms_norm", gated, dtype)]
        shared = 2 * config.ngroups * config.d_state
        channels += shared
        projected += shared + config.n_heads
    projection = {**common, "I": config.d_model, "O": projected}
    convolution = {**common, "E": channels, "K": config.d_conv}
    stream = {**common, "D": config.d_model}
    head = {**stream, "V": config.padded_vocab_size}
    return [
        *mixer,
        Case("causal_conv1d", convolution, dtype),
        Case("linear", projection, dtype),
        Case("add_rms_norm", stream, dtype),
        Case("linear_cross_entropy", head, dtype),
    ]


def within_reference_time(case: Case, *, share: float = 1.0) -> Case:
    """The case with fewer rows, then steps, then channels or heads, so that the truth is quick.

    A `share` below 1 makes it quicker.
    """
    sizes = dict(case.sizes)
    per_step = _state_letters(case.op)
    floor = min(sizes["L"], max(_SHORTEST_LENGTH, sizes.get("Q", 0) * 5 // 4))

    largest = _REFERENCE_ELEMENTS
    if case.op in _SUMMED:
        largest = min(largest, _REFERENCE_FLOPS // (6 * sizes[_SUMMED[case.op]]))
    elements = int(share * largest)

    def room(letter: str) -> int:
        others = math.prod(sizes[x] for x in {"B", "L", *per_step} - {letter})
        return max(1, elements // others)

    sizes["B"] = min(sizes["B"], room("B"))
    sizes["L"] = min(sizes["L"], max(floor, room("L")))
    widest = per_step[0]
    # Whole groups; kernels on GPUs want aligned channels.
    groups = sizes.get("G", 1)
    multiple = groups if widest == "H" else math.lcm(16, groups)
    sizes[widest] = min(sizes[widest], max(multiple, room(widest) // multiple * multiple))
    return replace(case, sizes=sizes)


def random_inputs(case: Case, *, device: torch.device | None = None) -> dict[str, Tensor]:
    """Inputs by the names of the op's contract, the same numbers at each call."""
    draw = _Draw(torch.Generator().manual_seed(11), case.sizes, case.dtype)
    inputs = {
        "selective_scan": _scan_inputs,
        "ssd": _ssd_inputs,
        "causal_conv1d": _conv_inputs,
        "linear": _linear_inputs,
        "add_rms_norm": _norm_inputs,
        "gated_rms_norm": _gated_norm_inputs,
        "linear_cross_entropy": _head_inputs,
    }[case.op](draw, case.as_in_model)
    return {name: tensor.to(device) for name, tensor in inputs.items()} if device else inputs


def our_op(case: Case, backend: str) -> Function:
    """The op with the options of `case`, on one backend."""
    function, options = _call_of(case)

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = function(**inputs, **options, backend=backend)
        return y

    return call


def _call_of(case: Case) -> tuple[Callable[..., Any], dict[str, Any]]:
    if case.op == "selective_scan":
        return selective_scan, {"delta_softplus": case.as_in_model}
    if case.op == "ssd":
        return ssd, {"dt_softplus": True, "chunk_size": case.sizes["Q"]}
    if case.op == "causal_conv1d":
        return causal_conv1d, {"activation": "silu"}
    if case.op == "linear":
        return linear, {}
    if case.op == "add_rms_norm":
        return _sum_of_norm_and_stream, {"eps": 1e-5, "output_dtype": case.dtype}
    if case.op == "gated_rms_norm":
        return gated_rms_norm, {
            "groups": case.sizes["G"],
            "eps": 1e-5,
            "output_dtype": case.dtype,
        }
    return linear_cross_entropy, {"vocab_size": _classes(case.sizes)}


def _sum_of_norm_and_stream(**arguments: Any) -> Tensor:
    """One output, through which both of the op's are seen."""
    normed, stream = add_rms_norm(**arguments)
    return normed + stream


def _classes(sizes: Mapping[str, int]) -> int:
    """Rows of the head that are no padding: all but the last, as in most models."""
    return max(1, sizes["V"] - 1)


def _state_letters(op: Op) -> str:
    """Sizes of what the reference holds per row and step; the first one may be reduced."""
    return {
        "selective_scan": "EN",
        "ssd": "HPN",
        "causal_conv1d": "EK",
        "linear": "O",
        "add_rms_norm": "D",
        "gated_rms_norm": "D",
        "linear_cross_entropy": "V",
    }[op]


@dataclass(frozen=True)
class _Draw:
    """Random tensors by size letters."""

    generator: torch.Generator
    sizes: Mapping[str, int]
    dtype: torch.dtype

    def activation(self, letters: str) -> Tensor:
        return self.parameter(letters).to(self.dtype)

    def parameter(self, letters: str) -> Tensor:
        return torch.randn([self.sizes[x] for x in letters], generator=self.generator)

    def decay(self, letters: str) -> Tensor:
        return -torch.exp(self.parameter(letters))

    def documents(self) -> Tensor:
        """(B, L) int32; documents of uneven lengths, a third of the row at most."""
        rows, length = self.sizes["B"], self.sizes["L"]
        starts = torch.rand(rows, length, generator=self.generator) < 3 / length
        return starts.cumsum(1).to(torch.int32)


def _scan_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    single_group = replace(draw, sizes={**draw.sizes, "G": 1})
    inputs = {
        "u": draw.activation("BLE"),
        "delta": draw.activation("BLE"),
        "A": draw.decay("EN"),
        "B": single_group.activation("BLGN"),
        "C": single_group.activation("BLGN"),
        "D": draw.parameter("E"),
    }
    if not as_in_model:
        # Step sizes as they are after softplus.
        return inputs | {
            "delta": torch.nn.functional.softplus(inputs["delta"].float() - 4).to(draw.dtype)
        }
    return inputs | {
        "z": draw.activation("BLE"),
        "delta_bias": draw.parameter("E") - 4,
        "seq_idx": draw.documents(),
    }


def _ssd_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    inputs = {
        "x": draw.activation("BLHP"),
        "dt": draw.activation("BLH"),
        "A": draw.decay("H"),
        "B": draw.activation("BLGN"),
        "C": draw.activation("BLGN"),
        "D": draw.parameter("H"),
        "dt_bias": draw.parameter("H") - 4,
    }
    return inputs | {"seq_idx": draw.documents()} if as_in_model else inputs


def _conv_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    inputs = {
        "x": draw.activation("BLE"),
        "weight": 0.5 * draw.parameter("EK"),
        "bias": draw.parameter("E"),
    }
    return inputs | {"seq_idx": draw.documents()} if as_in_model else inputs


def _linear_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    scale = draw.sizes["I"] ** -0.5
    return {"x": draw.activation("BLI"), "weight": scale * draw.parameter("OI")}


def _norm_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    return {
        "x": draw.activation("BLD"),
        "residual": draw.parameter("BLD"),
        "weight": 1 + 0.1 * draw.parameter("D"),
    }


def _gated_norm_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    return {
        "x": draw.activation("BLD"),
        "z": draw.activation("BLD"),
        "weight": 1 + 0.1 * draw.parameter("D"),
    }


def _head_inputs(draw: _Draw, as_in_model: bool) -> dict[str, Tensor]:
    shape = (draw.sizes["B"], draw.sizes["L"])
    labels = torch.randint(0, _classes(draw.sizes), shape, generator=draw.generator)
    return {
        "hidden": draw.activation("BLD"),
        "weight": 0.02 * draw.parameter("VD"),
        "labels": labels,
    }
