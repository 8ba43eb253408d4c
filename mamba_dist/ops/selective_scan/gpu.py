"""Selective scan on our own CUDA kernels, compiled at the first use; see `gpu_tile.cuh`.

The kernels have 16 states per channel and whole warps of 16 channels. Other sizes are brought to
that here, in operations that autograd sees: channels are padded with zeros, and more states are
scanned 16 at a time, since the output is a sum over states.

B batch, L length, E channels, N d_state, G groups.
"""

import ctypes
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.native.call import pointer, refuse_tangents, unit_stride
from mamba_dist.ops.nvrtc.compiler import USE_TORCH
from mamba_dist.ops.nvrtc.kernel import Kernel, launch

_STATES: Final = 16
_WARP_CHANNELS: Final = 16
_CHUNK_STEPS: Final = 32
# Warps of 16 channels that a large GPU has room for at once; rows that give fewer are cut along
# their length, at the price of a second pass.
_WARPS_WANTED: Final = 1536
_SHORTEST_PART_CHUNKS: Final = 8

_FORWARD_POINTERS: Final = (
    *("u", "delta", "z", "B", "C", "A", "D", "delta_bias", "initial_state", "seq_idx"),
    *("y", "final_state", "chunk_states", "split_states", "split_steps"),
)
_BACKWARD_POINTERS: Final = (
    *("u", "delta", "z", "B", "C", "y", "grad_y", "A", "D", "delta_bias"),
    *("chunk_states", "grad_final", "seq_idx", "du", "ddelta", "dz", "dBC"),
    *("dA", "dD", "ddelta_bias", "dinitial", "split_states"),
)
_ROW_STRIDES: Final = (
    *("u_batch", "u_row", "delta_batch", "delta_row", "z_batch", "z_row"),
    *("B_batch", "B_row", "B_group", "C_batch", "C_row", "C_group"),
)
_SIZES: Final = ("batch", "length", "channels", "groups", "splits")


def _struct(pointers: tuple[str, ...], numbers: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers),
        *((name, ctypes.c_int64) for name in numbers),
    ]


class _ForwardCall(ctypes.Structure):
    """`Call` of gpu_forward.cu."""

    _fields_ = _struct(_FORWARD_POINTERS, (*_ROW_STRIDES, "seq_idx_batch", *_SIZES))


class _BackwardCall(ctypes.Structure):
    """`Call` of gpu_backward.cu."""

    _fields_ = _struct(
        _BACKWARD_POINTERS,
        (*_ROW_STRIDES, "grad_y_batch", "grad_y_row", "seq_idx_batch", *_SIZES),
    )


class _ChainCall(ctypes.Structure):
    """`Call` of gpu_chain.cu."""

    _fields_ = _struct(
        ("A", "initial", "split_steps", "split_states"),
        ("batch", "channels", "splits", "backwards"),
    )


class _Inputs(NamedTuple):
    """What the kernels take: rows (B, L, E) and (B, L, G, 16) of one dtype, the rest in fp32."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor
    initial_state: Tensor | None
    seq_idx: Tensor | None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, E) in u's dtype and final state (B, E, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.selective_scan.selective_scan`. bf16 and fp32
    are read as they are, anything else and mixtures through fp32. With
    `torch.use_deterministic_algorithms` dB and dC are added up in a fixed order, for which each
    64 channels need (B, L, 2 N) fp32 for a while; all else has a fixed order anyway.

    Raises:
        BackendError: u is fp64, or the kernels cannot be compiled or run here.
    """
    if u.dtype == torch.float64:
        raise BackendError(f"ops backend 'gpu' has no fp64 selective_scan; {USE_TORCH}")
    refuse_tangents("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state)
    channels, d_state, groups = u.shape[2], A.shape[1], B.shape[2]
    rows = (u, delta, B, C) if z is None else (u, delta, B, C, z)
    storage = u.dtype if u.dtype == torch.bfloat16 else torch.float32
    if any(tensor.dtype != storage for tensor in rows):
        storage = torch.float32
    short = -(channels // groups) % _WARP_CHANNELS
    parameters = {"D": D, "delta_bias": delta_bias}
    vectors = {
        name: u.new_zeros(channels, dtype=torch.float32) if tensor is None else tensor.float()
        for name, tensor in parameters.items()
    }
    inputs = _Inputs(
        u=_widened(u.to(storage), groups, short),
        delta=_widened(delta.to(storage), groups, short),
        A=_widened(A.float().T, groups, short).T,
        B=B.to(storage),
        C=C.to(storage),
        D=_widened(vectors["D"], groups, short),
        z=None if z is None else _widened(z.to(storage), groups, short),
        delta_bias=_widened(vectors["delta_bias"], groups, short),
        initial_state=None
        if initial_state is None
        else _widened(initial_state.float().mT, groups, short).mT,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32),
    )
    y, final_state = _all_states(inputs, delta_softplus, d_state)
    y = _narrowed(y, groups, short)
    return y.to(u.dtype), _narrowed(final_state.mT, groups, short).mT


def _widened(values: Tensor, groups: int, more: int) -> Tensor:
    """(..., E) with `more` zeros after each group's channels."""
    if not more:
        return values
    by_group = values.reshape(*values.shape[:-1], groups, -1)
    return F.pad(by_group, (0, more)).flatten(-2)


def _narrowed(values: Tensor, groups: int, more: int) -> Tensor:
    if not more:
        return values
    return values.reshape(*values.shape[:-1], groups, -1)[..., :-more].flatten(-2)


def _all_states(inputs: _Inputs, softplus: bool, d_state: int) -> tuple[Tensor, Tensor]:
    """y and final state (B, E, N) for any N."""
    if d_state == _STATES:
        return _scan(inputs, softplus)
    missing = -d_state % _STATES
    padded = inputs._replace(
        A=F.pad(inputs.A, (0, missing)),
        B=F.pad(inputs.B, (0, missing)),
        C=F.pad(inputs.C, (0, missing)),
        initial_state=None
        if inputs.initial_state is None
        else F.pad(inputs.initial_state, (0, missing)),
    )
    if d_state < _STATES:
        y, final_state = _scan(padded, softplus)
        return y, final_state[..., :d_state]
    total, states = None, []
    for first in range(0, d_state, _STATES):
        part = slice(first, first + _STATES)
        # In fp32, as the sum over states is rounded only once; skip and gate come after it.
        y, final_state = _scan(
            padded._replace(
                u=inputs.u.float(),
                delta=inputs.delta.float(),
                A=padded.A[:, part],
                B=padded.B[..., part].float(),
                C=padded.C[..., part].float(),
                D=torch.zeros_like(inputs.D),
                z=None,
                initial_state=None
                if padded.initial_state is None
                else padded.initial_state[..., part],
            ),
            softplus,
        )
        total = y if total is None else total + y
        states.append(final_state)
    assert total is not None
    total = total + inputs.D * inputs.u.float()
    if inputs.z is not None:
        total = total * F.silu(inputs.z.float())
    return total.to(inputs.u.dtype), torch.cat(states, dim=-1)[..., :d_state]


def _scan(inputs: _Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = _SelectiveScan.apply(softplus, *inputs)  # type: ignore[no-untyped-call]
    return outputs


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = _prepared(_Inputs(*tensors))  # type: ignore[arg-type]
        keep_states = any(ctx.needs_input_grad)
        y, final_state, chunk_states, split_steps = _run_forward(inputs, softplus, keep_states)
        if keep_states:
            ctx.softplus = softplus
            ctx.save_for_backward(*inputs, y, chunk_states, split_steps)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        *saved, y, chunk_states, split_steps = ctx.saved_tensors
        inputs = _Inputs(*saved)
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        grad_final = None if grad_final is None else grad_final.contiguous()
        kept = (y, chunk_states, split_steps)
        return None, *_run_backward(inputs, ctx.softplus, kept, (grad_y, grad_final)), None


def _prepared(inputs: _Inputs) -> _Inputs:
    """Rows that the kernels can read two or four elements at a time; the rest contiguous."""
    return _Inputs(
        u=_aligned(inputs.u, 2),
        delta=_aligned(inputs.delta, 2),
        A=inputs.A.contiguous(),
        B=_aligned(inputs.B, 4),
        C=_aligned(inputs.C, 4),
        D=inputs.D.contiguous(),
        z=None if inputs.z is None else _aligned(inputs.z, 2),
        delta_bias=inputs.delta_bias.contiguous(),
        initial_state=None if inputs.initial_state is None else inputs.initial_state.contiguous(),
        seq_idx=None if inputs.seq_idx is None else unit_stride(inputs.seq_idx),
    )


def _aligned(tensor: Tensor, elements: int) -> Tensor:
    tensor = unit_stride(tensor)
    fits = all(stride % elements == 0 for stride in tensor.stride()[:-1])
    in_place = fits and tensor.data_ptr() % (elements * tensor.element_size()) == 0
    return tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)


def _splits(batch: int, length: int, channels: int) -> int:
    """Parts to cut each row into; by the shape alone, so that results do not depend on the GPU."""
    warps = batch * channels // _WARP_CHANNELS
    chunks = -(-length // _CHUNK_STEPS)
    return max(1, min(_WARPS_WANTED // warps, chunks // _SHORTEST_PART_CHUNKS))


def _warps(channels_per_group: int) -> int:
    """Warps of one block, which share B and C."""
    return next(n for n in (4, 2, 1) if channels_per_group % (n * _WARP_CHANNELS) == 0)


def _kernel(direction: str, inputs: _Inputs, softplus: bool, **macros: bool) -> Kernel:
    channels = inputs.u.shape[2]
    warps = _warps(channels // inputs.B.shape[2])
    named = {
        "STORAGE_BF16": inputs.u.dtype == torch.bfloat16,
        "SOFTPLUS": softplus,
        "GATE": inputs.z is not None,
        "DOCUMENTS": inputs.seq_idx is not None,
        **macros,
    }
    return Kernel(
        source=Path(__file__).with_name(f"gpu_{direction}.cu"),
        name=f"selective_scan_{direction}",
        macros=tuple((name, int(value)) for name, value in named.items()),
        threads=32 * warps,
        blocks_per_sm=16 // warps,
    )


def _blocks(inputs: _Inputs, kernel: Kernel, splits: int) -> int:
    batch, _, channels = inputs.u.shape
    return batch * splits * (channels // (kernel.threads // 32 * _WARP_CHANNELS))


def _run_forward(
    inputs: _Inputs, softplus: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, final state, the states before each chunk (B, chunks, E, 16), the parts' summed steps."""
    u, A = inputs.u, inputs.A
    batch, length, channels = u.shape
    y = u.new_empty(u.shape)
    final_state = A.new_empty(batch, channels, _STATES)
    chunks = -(-length // _CHUNK_STEPS)
    chunk_states = A.new_empty(batch, chunks, channels, _STATES) if keep_states else None
    splits = _splits(batch, length, channels)
    split_states = A.new_empty(batch, splits, channels, _STATES) if splits > 1 else None
    split_steps = A.new_empty(batch, splits, channels) if splits > 1 else None
    outputs = (y, final_state, chunk_states, split_states, split_steps)
    call = _ForwardCall(
        *map(pointer, (*_kernel_rows(inputs), *_parameters(inputs))),
        *map(pointer, (inputs.initial_state, inputs.seq_idx, *outputs)),
        *_strides(inputs),
        0 if inputs.seq_idx is None else inputs.seq_idx.stride(0),
        *(batch, length, channels, inputs.B.shape[2], splits),
    )
    for local in (True, False) if splits > 1 else (False,):
        kernel = _kernel(
            "forward", inputs, softplus, KEEP_STATES=keep_states and not local, LOCAL=local
        )
        warps = kernel.threads // 32
        launch(
            kernel,
            call,
            blocks=_blocks(inputs, kernel, splits),
            shared_bytes=4 * (_CHUNK_STEPS * 32 + warps * 3 * 8 * _WARP_CHANNELS),
            device=u.device,
        )
        if local:
            _chain(inputs, inputs.initial_state, split_steps, split_states, backwards=False)
    return y, final_state, chunk_states, split_steps


def _chain(
    inputs: _Inputs,
    initial: Tensor | None,
    split_steps: Tensor | None,
    split_states: Tensor | None,
    *,
    backwards: bool,
) -> None:
    assert split_steps is not None
    batch, splits, channels = split_steps.shape
    kernel = Kernel(Path(__file__).with_name("gpu_chain.cu"), "selective_scan_chain", (), 256)
    call = _ChainCall(
        *map(pointer, (inputs.A, initial, split_steps, split_states)),
        *(batch, channels, splits, int(backwards)),
    )
    blocks = -(-batch * channels * _STATES // kernel.threads)
    launch(kernel, call, blocks=blocks, shared_bytes=0, device=inputs.u.device)


def _kernel_rows(inputs: _Inputs) -> tuple[Tensor | None, ...]:
    return inputs.u, inputs.delta, inputs.z, inputs.B, inputs.C


def _parameters(inputs: _Inputs) -> tuple[Tensor, ...]:
    return inputs.A, inputs.D, inputs.delta_bias


def _strides(inputs: _Inputs) -> tuple[int, ...]:
    z = (0, 0) if inputs.z is None else inputs.z.stride()[:2]
    return (
        *(*inputs.u.stride()[:2], *inputs.delta.stride()[:2], *z),
        *(*inputs.B.stride()[:3], *inputs.C.stride()[:3]),
    )


def _run_backward(
    inputs: _Inputs,
    softplus: bool,
    kept: tuple[Tensor, Tensor, Tensor | None],
    output_gradients: tuple[Tensor, Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state."""
    (y, chunk_states, split_steps), (grad_y, grad_final) = kept, output_gradients
    grad_y = _aligned(grad_y.to(y.dtype), 2)
    batch, length, channels = y.shape
    groups = inputs.B.shape[2]
    splits = 1 if split_steps is None else split_steps.shape[1]
    deterministic = torch.are_deterministic_algorithms_enabled()
    kernel = _kernel("backward", inputs, softplus, DETERMINISTIC=deterministic, LOCAL=False)
    warps = kernel.threads // 32
    tiles = channels // groups // (warps * _WARP_CHANNELS) if deterministic else 1
    du, ddelta = torch.empty_like(y), torch.empty_like(y)
    dz = None if inputs.z is None else torch.empty_like(y)
    dBC = inputs.A.new_zeros(tiles, batch, length, groups, 2 * _STATES)
    dA = inputs.A.new_empty(batch, splits, channels, _STATES)
    dD, dbias = inputs.A.new_empty(2, batch, splits, channels)
    dinitial = None if inputs.initial_state is None else torch.empty_like(inputs.initial_state)
    split_states = None if splits == 1 else torch.empty_like(dA)
    gradients = (du, ddelta, dz, dBC, dA, dD, dbias, dinitial)
    call = _BackwardCall(
        *map(pointer, (*_kernel_rows(inputs), y, grad_y, *_parameters(inputs))),
        *map(pointer, (chunk_states, grad_final, inputs.seq_idx, *gradients, split_states)),
        *_strides(inputs),
        *grad_y.stride()[:2],
        0 if inputs.seq_idx is None else inputs.seq_idx.stride(0),
        *(batch, length, channels, groups, splits),
    )
    # B and C in four orders; per warp six noted states, the chunk's steps, two tiles, two sets of
    # dB and dC, and two numbers a channel.
    per_warp = 6 * 8 * 32 + _CHUNK_STEPS * _WARP_CHANNELS + 2 * 4 * _WARP_CHANNELS
    per_warp += 2 * 4 * 32 + 2 * _WARP_CHANNELS
    shared_bytes = 4 * (_CHUNK_STEPS * 128 + warps * per_warp)
    for local in (True, False) if splits > 1 else (False,):
        chosen = kernel
        if local:
            chosen = _kernel("backward", inputs, softplus, DETERMINISTIC=False, LOCAL=True)
        launch(
            chosen,
            call,
            blocks=_blocks(inputs, chosen, splits),
            shared_bytes=shared_bytes,
            device=y.device,
        )
        if local:
            _chain(inputs, grad_final, split_steps, split_states, backwards=True)
    dB, dC = dBC.sum(0).to(inputs.B.dtype).chunk(2, dim=-1)
    return (
        *(du, ddelta, dA.sum((0, 1)), dB, dC, dD.sum((0, 1))),
        *(dz, dbias.sum((0, 1)), dinitial),
    )
