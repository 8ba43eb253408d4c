"""What bench gpu-ops measures: our backends, and what others run for the same op on a GPU.

Every variant gets its inputs in the layout that it reads without a copy.

B batch, L length, E channels, N d_state, H heads, P headdim, G groups, K kernel width, D width of
the stream, V rows of the head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.commands.bench.cases import Case, Op, random_inputs
from mamba_dist.ops import cuda_packages
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.gated_rms_norm import gated_rms_norm
from mamba_dist.ops.rms_norm import add_rms_norm
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

Inputs = Mapping[str, Tensor]
Call = Callable[[Inputs], tuple[Tensor, ...]]

OURS: Final = ("gpu", "cuda", "torch", "cpu")
PEERS: Final[Mapping[Op, tuple[str, ...]]] = {
    "selective_scan": ("mamba-ssm",),
    "ssd": ("mamba-ssm",),
    # Mamba-1 calls it with channels first, Mamba-2 with channels last.
    "causal_conv1d": ("causal-conv1d", "causal-conv1d-last"),
    "add_rms_norm": ("mamba-ssm",),
    "gated_rms_norm": ("mamba-ssm",),
    "linear_cross_entropy": ("F.cross_entropy",),
}
# Of each op's outputs; the state belongs to them only where it is asked for.
OUTPUTS: Final[Mapping[Op, tuple[str, ...]]] = {
    "selective_scan": ("y", "final_state"),
    "ssd": ("y", "final_state"),
    "causal_conv1d": ("y", "final_state"),
    "add_rms_norm": ("y", "stream"),
    "gated_rms_norm": ("y",),
    "linear_cross_entropy": ("loss",),
}
_PER_POSITION: Final = frozenset({"u", "delta", "B", "C", "z", "x", "dt", "residual", "hidden"})
_STEPS: Final[Mapping[Op, tuple[str, str]]] = {
    "selective_scan": ("delta", "delta_bias"),
    "ssd": ("dt", "dt_bias"),
}
_EPS: Final = 1e-5
# Documents per row, about.
_DOCUMENTS: Final = 4


@dataclass(frozen=True)
class Variant:
    """One implementation of an op.

    call: from its inputs to its outputs, those of OUTPUTS in their order.
    length_last: names of inputs and outputs whose second dimension, the length, it wants last.
    """

    name: str
    call: Call
    length_last: frozenset[str] = frozenset()

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of our layout in the variant's."""
        return tensor.movedim(1, -1).contiguous() if name in self.length_last else tensor

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the variant's layout in ours."""
        return tensor.movedim(-1, 1) if name in self.length_last else tensor


def variant(case: Case, name: str, device: torch.device) -> Variant:
    """Our backend or the peer of this name, ready to be called.

    Raises:
        BackendError: it cannot run here; the message says what to install.
    """
    if name in OURS:
        return Variant(name, our_call(case, resolve_backend(name, device_type=device.type)))
    return {
        "selective_scan": _mamba_ssm_scan,
        "ssd": _mamba_ssm_ssd,
        "causal_conv1d": _causal_conv1d_peer,
        "add_rms_norm": _mamba_ssm_norm,
        "gated_rms_norm": _mamba_ssm_gated_norm,
        "linear_cross_entropy": _torch_cross_entropy,
    }[case.op](case, name)


def our_call(case: Case, backend: str) -> Call:
    """The op with the options of training; with its final state if it is given an initial one."""
    function, options = _our_function(case)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        state = {"return_final_state": True} if "initial_state" in inputs else {}
        outputs = function(**inputs, **options, **state, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def model_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Inputs as a real model has them, by the names of the op's contract; the same at each call.

    Decays and steps are those of a trained model's order: -A about 1 to 16, steps after softplus
    about 0.002 to 0.1. Drawn on the device, because hundreds of millions of numbers take a CPU
    longer than the whole measurement. Documents are in them if the case is `as_in_model`.
    """
    generator = torch.Generator(device).manual_seed(11)
    shape = (case.sizes["B"], case.sizes["L"])
    one_position = replace(case, sizes={**case.sizes, "B": 1, "L": 1}, as_in_model=True)
    inputs = random_inputs(one_position, device=device)
    for name, tensor in inputs.items():
        if name in _PER_POSITION:
            inputs[name] = torch.randn(
                *shape, *tensor.shape[2:], generator=generator, device=device, dtype=tensor.dtype
            )
    if case.op in _STEPS:
        steps, bias = _STEPS[case.op]
        inputs[steps] *= 0.5
        inputs[bias].uniform_(-6, -2, generator=generator)
        inputs["A"] = _decays(inputs["A"], generator)
    if case.op == "linear_cross_entropy":
        inputs["labels"] = torch.randint(case.sizes["V"], shape, generator=generator, device=device)
    if "seq_idx" in inputs and case.as_in_model:
        starts = torch.rand(*shape, generator=generator, device=device) < _DOCUMENTS / shape[1]
        inputs["seq_idx"] = starts.cumsum(1).to(torch.int32)
    else:
        inputs.pop("seq_idx", None)
    return inputs


def initial_state(case: Case, device: torch.device) -> Tensor | None:
    """A random state for the op, fp32 as a run in the case's dtype left it; None if it has none."""
    sizes = case.sizes
    shapes = {
        "selective_scan": ("B", "E", "N"),
        "ssd": ("B", "H", "P", "N"),
        "causal_conv1d": ("B", "E", "K"),
    }
    if case.op not in shapes:
        return None
    generator = torch.Generator(device).manual_seed(12)
    shape = [sizes[letter] for letter in shapes[case.op]]
    if case.op == "causal_conv1d":
        shape[-1] -= 1
        # Inputs of earlier positions, which were in the case's dtype.
        return torch.randn(shape, generator=generator, device=device).to(case.dtype).float()
    return torch.randn(shape, generator=generator, device=device)


def expected_outputs(op: Op, inputs: Inputs) -> dict[str, Tensor]:
    """Tensors with the shapes and dtypes of the outputs; with the final state if it is asked for.

    Most of them are inputs, so that they cost no memory.
    """
    if op == "linear_cross_entropy":
        hidden = inputs["hidden"]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return {"loss": torch.empty((), dtype=dtype, device=hidden.device)}
    if op == "add_rms_norm":
        return {"y": inputs["x"], "stream": inputs["residual"]}
    outputs = {"y": inputs["u" if op == "selective_scan" else "x"]}
    if "initial_state" in inputs:
        outputs["final_state"] = inputs["initial_state"]
    return outputs


def least_bytes(op: Op, inputs: Inputs, outputs: Inputs) -> tuple[int, int]:
    """Bytes that the forward and the backward move at least, each tensor once.

    Forward: inputs and outputs. Backward: inputs again, gradients of the outputs and of the inputs;
    that of the norm needs the sum of its inputs, which is an output, in their place.
    """
    read, written = _bytes(inputs), _bytes(outputs)
    gradients = _bytes({n: t for n, t in inputs.items() if t.is_floating_point()})
    again = read
    if op == "add_rms_norm":
        again = inputs["weight"].nbytes + outputs["stream"].nbytes
    return read + written, again + written + gradients


def _bytes(tensors: Inputs) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _decays(like: Tensor, generator: torch.Generator) -> Tensor:
    """Negative (E, N), near -(1..N) per channel as at initialisation; or (H,), from -16 to -1."""
    if like.dim() == 1:
        return -torch.empty_like(like).uniform_(1, 16, generator=generator)
    noise = torch.randn(like.shape, generator=generator, device=like.device)
    return -torch.arange(1, like.shape[1] + 1, device=like.device) * torch.exp(0.3 * noise)


def _our_function(case: Case) -> tuple[Callable[..., Any], dict[str, Any]]:
    if case.op == "selective_scan":
        return selective_scan, {"delta_softplus": True}
    if case.op == "ssd":
        return ssd, {"dt_softplus": True, "chunk_size": case.sizes["Q"]}
    if case.op == "causal_conv1d":
        return causal_conv1d, {"activation": "silu"}
    if case.op == "add_rms_norm":
        return add_rms_norm, {"eps": _EPS, "output_dtype": case.dtype}
    if case.op == "gated_rms_norm":
        options = {"groups": case.sizes["G"], "eps": _EPS, "output_dtype": case.dtype}
        return gated_rms_norm, options
    # All rows, as the peer has no notion of padding.
    return linear_cross_entropy, {"vocab_size": case.sizes["V"]}


def _mamba_ssm_scan(case: Case, name: str) -> Variant:
    scan = cuda_packages.selective_scan_fn()

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return (scan(**x, delta_softplus=True),)

    return Variant(name, call, frozenset({"u", "delta", "B", "C", "z", "y"}))


def _mamba_ssm_ssd(case: Case, name: str) -> Variant:
    scan = cuda_packages.mamba_chunk_scan_combined()
    if case.dtype == torch.float32:
        cuda_packages.keep_fp32_products()

    def call(x: Inputs) -> tuple[Tensor, ...]:
        return (scan(**x, dt_softplus=True, chunk_size=case.sizes["Q"]),)

    return Variant(name, call)


def _causal_conv1d_peer(case: Case, name: str) -> Variant:
    convolve = cuda_packages.causal_conv1d_fn()

    def first(x: Inputs) -> tuple[Tensor, ...]:
        return (convolve(x["x"], x["weight"], x["bias"], activation="silu"),)

    def last(x: Inputs) -> tuple[Tensor, ...]:
        return (convolve(x["x"].mT, x["weight"], x["bias"], activation="silu").mT,)

    if name == "causal-conv1d-last":
        return Variant(name, last)
    return Variant(name, first, frozenset({"x", "y"}))


def _mamba_ssm_norm(case: Case, name: str) -> Variant:
    norm = cuda_packages.rms_norm_fn()

    def call(x: Inputs) -> tuple[Tensor, ...]:
        y, stream = norm(
            x["x"],
            x["weight"],
            None,
            residual=x["residual"],
            eps=_EPS,
            prenorm=True,
            residual_in_fp32=True,
        )
        return y, stream

    return Variant(name, call)


def _mamba_ssm_gated_norm(case: Case, name: str) -> Variant:
    norm = cuda_packages.gated_rms_norm_fn()
    width = case.sizes["D"] // case.sizes["G"]

    def call(x: Inputs) -> tuple[Tensor, ...]:
        options = {"eps": _EPS, "group_size": width, "norm_before_gate": False}
        return (norm(x["x"], x["weight"], None, z=x["z"], **options),)

    return Variant(name, call)


def _torch_cross_entropy(case: Case, name: str) -> Variant:
    def call(x: Inputs) -> tuple[Tensor, ...]:
        # What users write: under autocast the product is bf16, and the logits become fp32.
        logits = F.linear(x["hidden"].flatten(0, 1), x["weight"])
        return (F.cross_entropy(logits.float(), x["labels"].flatten(), reduction="sum"),)

    return Variant(name, call)
