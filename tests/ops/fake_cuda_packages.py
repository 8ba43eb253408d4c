"""Stand-ins for mamba-ssm 2.3 and causal-conv1d 1.7 on a machine without a GPU.

They take what the real functions take, refuse what those refuse, know what those know about
documents and no more, and follow the arithmetic of the real kernels where it has traps: the
backward of the scan, the clamped decays of SSD, ids compared by value. Each call is recorded.

Channels first: B batch, E channels, L length, N d_state, G groups, K width.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

# Looks for triton when it is first imported, which must not be while the stand-in is there.
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

HALF_OR_FLOAT = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Calls:
    """The arguments of each call by name, and the precision that Triton was told to keep."""

    selective_scan_fn: list[dict[str, Any]] = field(default_factory=list)
    mamba_chunk_scan_combined: list[dict[str, Any]] = field(default_factory=list)
    causal_conv1d_fn: list[dict[str, Any]] = field(default_factory=list)
    triton_language: Any = field(default_factory=lambda: SimpleNamespace(fp32_default=None))


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts the stand-ins where the packages would be."""
    calls = Calls()

    def recorded(name: str, function: Any, *, parameters: tuple[str, ...]) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            getattr(calls, name).append(dict(zip(parameters, args, strict=False)) | kwargs)
            return function(*args, **kwargs)

        return wrapper

    scan = recorded(
        "selective_scan_fn",
        selective_scan_fn,
        parameters=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
    )
    ssd = recorded(
        "mamba_chunk_scan_combined",
        mamba_chunk_scan_combined,
        parameters=("x", "dt", "A", "B", "C", "chunk_size"),
    )
    conv = recorded("causal_conv1d_fn", causal_conv1d_fn, parameters=("x", "weight", "bias"))
    modules = {
        "triton": {"knobs": SimpleNamespace(language=calls.triton_language)},
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            "selective_scan_fn": scan,
            "selective_scan_cuda": object(),
        },
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": ssd},
        "causal_conv1d": {"causal_conv1d_fn": conv},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    return _SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        return_last_state: bool,
    ) -> Any:
        (batch, channels, length), d_state, groups = u.shape, A.shape[1], B.shape[1]
        assert u.dtype in HALF_OR_FLOAT
        assert A.dtype == torch.float32
        assert A.shape == (channels, d_state)
        assert d_state <= 256
        assert channels % groups == 0
        for tensor in (delta, z):
            assert tensor is None or (tensor.shape, tensor.dtype) == (u.shape, u.dtype)
        for tensor in (B, C):
            assert (tensor.shape, tensor.dtype) == ((batch, groups, d_state, length), u.dtype)
        for tensor in (D, delta_bias):
            assert tensor is None or (tensor.shape, tensor.dtype) == ((channels,), torch.float32)
        assert delta_bias is None or delta_bias.stride(-1) == 1
        for tensor in (u, delta, B, C, z):
            # The real one would copy, silently.
            assert tensor is None or tensor.stride(-1) == 1

        _, inflow, decay = _terms(u, delta, A, B, delta_bias, delta_softplus)
        states = [u.new_zeros(batch, channels, d_state, dtype=torch.float32)]
        for t in range(length):
            states.append(decay[..., t] * states[-1] + inflow[..., t])
        history = torch.stack(states[1:], dim=3)
        out = (history * _to_channels(C, channels)).sum(2)
        if D is not None:
            out = out + D[:, None] * u.float()
        out = out.to(u.dtype)
        gated = out if z is None else (out.float() * F.silu(z.float())).to(u.dtype)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, history, out)
        ctx.delta_softplus = delta_softplus
        return (gated, history[..., -1]) if return_last_state else gated

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_dlast_state: Tensor) -> Any:
        u, delta, A, B, C, D, z, delta_bias, history, out = ctx.saved_tensors
        assert dout.dtype == u.dtype
        channels, dz = u.shape[1], None
        dout, x = dout.float(), u.float()
        step, inflow, decay = _terms(u, delta, A, B, delta_bias, ctx.delta_softplus)
        B_channels, C_channels = _to_channels(B, channels), _to_channels(C, channels)
        if z is not None:
            gate, sigmoid = F.silu(z.float()), torch.sigmoid(z.float())
            dz = dout * out.float() * sigmoid * (1 + z.float() * (1 - sigmoid))
            dout = dout * gate
        adjoint, reversed_adjoints = torch.zeros_like(history[..., 0]), []
        for t in reversed(range(u.shape[2])):
            following = decay[..., t + 1] if t + 1 < u.shape[2] else torch.ones_like(adjoint)
            adjoint = following * adjoint + dout[:, :, None, t] * C_channels[..., t]
            reversed_adjoints.append(adjoint)
        dx = torch.stack(reversed_adjoints[::-1], dim=3)
        # As in the kernel: the decayed state is what is left of the state without the inflow.
        kept = history - inflow
        d_product = (dx * B_channels).sum(2)
        du = d_product * step + (0.0 if D is None else D[:, None] * dout)
        ddelta = d_product * x + (dx * A[:, :, None] * kept).sum(2)
        dA = (dx * step[:, :, None] * kept).sum((0, 3))
        if ctx.delta_softplus:
            raw = delta.float() + (0.0 if delta_bias is None else delta_bias[:, None])
            ddelta = torch.where(raw <= 20, ddelta / (1 + torch.exp(-raw)), ddelta)
        dB = _to_groups(dx * (step * x)[:, :, None], B)
        dC = _to_groups(dout[:, :, None] * history, C)
        return (
            du.to(u.dtype),
            ddelta.to(u.dtype),
            dA,
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else (dout * x).sum((0, 2)),
            None if dz is None else dz.to(u.dtype),
            None if delta_bias is None else ddelta.sum((0, 2)),
            None,
            None,
        )


def _terms(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, softplus: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Step (B, E, L), and inflow and decay (B, E, N, L), in fp32."""
    step = delta.float() + (0.0 if delta_bias is None else delta_bias[:, None])
    step = F.softplus(step) if softplus else step
    inflow = (step * u.float())[:, :, None] * _to_channels(B, u.shape[1])
    return step, inflow, torch.exp(step[:, :, None] * A[:, :, None])


def _to_channels(values: Tensor, channels: int) -> Tensor:
    return values.float().repeat_interleave(channels // values.shape[1], dim=1)


def _to_groups(values: Tensor, like: Tensor) -> Tensor:
    return values.unflatten(1, (like.shape[1], -1)).sum(2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """Layouts (B, L, H, P), (B, L, H), (B, L, G, N); by autograd, in float64.

    In fp32 the differences of running sums cost more digits than the tests allow the wrapper.
    """
    (batch, length, heads, headdim), (groups, d_state) = x.shape, B.shape[2:]
    assert x.dtype in HALF_OR_FLOAT
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert heads % groups == 0
    assert B.shape == C.shape == (batch, length, groups, d_state)
    assert z is None or z.shape == x.shape
    assert D is None or (D.shape == (heads,) and D.stride(-1) == 1)
    assert initial_states is None or initial_states.shape == (batch, heads, headdim, d_state)
    assert seq_idx is None or (seq_idx.shape, seq_idx.dtype) == ((batch, length), torch.int32)
    assert not return_varlen_states
    # Its backward reads B and C as if their last stride were 1.
    assert B.stride(-1) == C.stride(-1) == x.stride(-1) == 1
    # Their matrix products want equal dtypes.
    assert B.dtype == C.dtype == x.dtype
    if chunk_size & (chunk_size - 1):
        return (x * float("nan"), None) if return_final_states else x * float("nan")

    steps = dt.double() + (0.0 if dt_bias is None else dt_bias.double())
    steps = torch.clamp(F.softplus(steps) if dt_softplus else steps, *dt_limit)
    values, documents = x.double(), seq_idx
    if documents is None:
        documents = torch.zeros(batch, length, dtype=torch.int32)
    B_heads, C_heads = (t.double().repeat_interleave(heads // groups, dim=2) for t in (B, C))
    state = values.new_zeros(batch, heads, headdim, d_state)
    if initial_states is not None:
        state = initial_states.double()
    document_before = torch.zeros(batch, 1, dtype=torch.int32)
    outputs = []
    for start in range(0, length, chunk_size):
        part = slice(start, min(start + chunk_size, length))
        ids = documents[:, part]
        exponent = (steps[:, part] * A.double()).cumsum(1)  # (B, Q, H)
        # Not masked by document: the running sum goes on.
        decay = torch.exp((exponent[:, :, None] - exponent[:, None]).clamp(max=0.0))
        causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        same = (ids[:, :, None] == ids[:, None]) & causal
        mixing = torch.einsum("bqhn,bkhn->bqkh", C_heads[:, part], B_heads[:, part])
        mixing = torch.where(same[..., None], mixing * decay, 0.0) * steps[:, None, part]
        y = torch.einsum("bqkh,bkhp->bqhp", mixing, values[:, part])
        carried = torch.where((ids == document_before)[..., None], torch.exp(exponent), 0.0)
        y = y + torch.einsum("bqhn,bhpn->bqhp", C_heads[:, part], state) * carried[..., None]
        outputs.append(y)
        to_end = torch.exp((exponent[:, -1:] - exponent).clamp(max=0.0)) * steps[:, part]
        to_end = torch.where((ids == ids[:, -1:])[..., None], to_end, 0.0)
        inflow = torch.einsum("bqh,bqhp,bqhn->bhpn", to_end, values[:, part], B_heads[:, part])
        keeps = torch.where(ids[:, -1:] == document_before, torch.exp(exponent[:, -1]), 0.0)
        state = keeps[..., None, None] * state + inflow
        document_before = ids[:, -1:]
    out = torch.cat(outputs, dim=1)
    if D is not None:
        out = out + D.double()[:, None] * values
    if z is not None:
        out = out * F.silu(z.double())
    out = out.to(x.dtype)
    return (out, state.float()) if return_final_states else out


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    # What older versions assert; newer ones take both.
    assert seq_idx is None or initial_states is None
    assert not return_final_states
    assert activation in (None, "silu", "swish")
    return _CausalConv1d.apply(x, weight, bias, seq_idx, activation is not None)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seq_idx: Tensor | None,
        silu: bool,
    ) -> Tensor:
        assert x.dtype in HALF_OR_FLOAT
        assert weight.dtype in HALF_OR_FLOAT
        assert weight.shape[0] == x.shape[1]
        assert 2 <= weight.shape[1] <= 4
        assert bias is None or (bias.dtype, bias.stride(-1)) == (weight.dtype, 1)
        _check_channels_last(x)
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            assert seq_idx.shape == (x.shape[0], x.shape[2])
        ctx.save_for_backward(x, weight, bias, seq_idx)
        ctx.silu = silu
        return _convolve(x, weight, bias, seq_idx, silu)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, weight, bias, seq_idx = ctx.saved_tensors
        if dout.stride(1) == 1:
            _check_channels_last(dout)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
            out = _convolve(*leaves, *([None] * (3 - len(leaves))), seq_idx, ctx.silu)
            gradients = torch.autograd.grad(out, leaves, dout)
        return *gradients, *([None] * (5 - len(leaves)))


def _check_channels_last(x: Tensor) -> None:
    assert x.stride(1) == 1
    assert x.stride(2) > 1
    assert x.shape[1] % 8 == 0
    assert x.stride(0) % 8 == 0
    assert x.stride(2) % 8 == 0
    assert x.data_ptr() % 16 == 0


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    kept = weight.shape[1] - 1
    windows = F.pad(x.float(), (kept, 0)).unfold(2, kept + 1, 1)  # (B, E, L, K)
    if seq_idx is not None:
        ids = F.pad(seq_idx, (kept, 0), value=-1).unfold(1, kept + 1, 1)
        windows = torch.where((ids == seq_idx[..., None])[:, None], windows, 0.0)
    out = (windows * weight.float()[:, None]).sum(-1)
    if bias is not None:
        out = out + bias.float()[:, None]
    out = F.silu(out) if silu else out
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[:, None], 0.0)
    return out.to(x.dtype).mT.contiguous().mT


@contextmanager
def elements_limited(limit: int) -> Iterator[None]:
    """Context in which the kernels can address fewer elements than they can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba_dist.ops.cuda_packages.MAX_ELEMENTS", limit)
        yield
