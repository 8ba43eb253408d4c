"""Launches the selective scan's CUDA kernels; see `gpu_tile.cuh` for what they do.

B batch, L length, E channels, G groups; 16 states, whole warps of 16 channels.
"""

import ctypes
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mamba_dist.ops.native.call import pointer, unit_stride
from mamba_dist.ops.nvrtc.kernel import Kernel, call_fields, launch, specialised

_SOURCES: Final = MappingProxyType(
    {name: Path(__file__).with_name(f"gpu_{name}.cu") for name in ("forward", "backward", "chain")}
)
STATES: Final = 16
"""States of a channel in one scan."""
WARP_CHANNELS: Final = 16
"""Of which the channels of a group are a multiple."""
_CHUNK_STEPS: Final = 32
# Warps that a large GPU has room for at once, by 128 registers and shared memory. Rows that give
# far fewer are cut along their length, at the price of a second pass.
_WARPS_WANTED: Final = 2048
_FEWEST_WARPS: Final = 768
_SHORTEST_PART_CHUNKS: Final = 8
_MULTIPROCESSORS: Final = 132

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


class _ForwardCall(ctypes.Structure):
    """`Call` of gpu_forward.cu."""

    _fields_ = call_fields(_FORWARD_POINTERS, (*_ROW_STRIDES, "seq_idx_batch", *_SIZES))


class _BackwardCall(ctypes.Structure):
    """`Call` of gpu_backward.cu."""

    _fields_ = call_fields(
        _BACKWARD_POINTERS,
        (*_ROW_STRIDES, "grad_y_batch", "grad_y_row", "dz_gap", "seq_idx_batch", *_SIZES),
    )


class _ChainCall(ctypes.Structure):
    """`Call` of gpu_chain.cu."""

    _fields_ = call_fields(
        ("A", "initial", "split_steps", "split_states"),
        ("batch", "channels", "splits", "backwards"),
    )


class ScanInputs(NamedTuple):
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


def prepared(inputs: ScanInputs) -> ScanInputs:
    """Rows that the kernels can read four elements at a time; the rest contiguous."""
    return ScanInputs(
        u=_aligned(inputs.u, 4),
        delta=_aligned(inputs.delta, 4),
        A=inputs.A.contiguous(),
        B=_aligned(inputs.B, 4),
        C=_aligned(inputs.C, 4),
        D=inputs.D.contiguous(),
        z=None if inputs.z is None else _aligned(inputs.z, 4),
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
    warps = batch * channels // WARP_CHANNELS
    if warps >= _FEWEST_WARPS:
        return 1
    chunks = -(-length // _CHUNK_STEPS)
    return max(1, min(_WARPS_WANTED // warps, chunks // _SHORTEST_PART_CHUNKS))


def _warps(channels_per_group: int) -> int:
    """Warps of one block, which share B and C."""
    return next(n for n in (4, 2, 1) if channels_per_group % (n * WARP_CHANNELS) == 0)


def _kernel(
    direction: str, inputs: ScanInputs, softplus: bool, splits: int, **macros: bool
) -> tuple[Kernel, int]:
    """The kernel specialised for the inputs, and its number of blocks."""
    batch, _, channels = inputs.u.shape
    warps = _warps(channels // inputs.B.shape[2])
    blocks = batch * splits * (channels // (warps * WARP_CHANNELS))
    # Fewer blocks at a time may have more registers each; as if for a large GPU, so that no
    # other code runs on a smaller one.
    per_sm = -(-blocks // _MULTIPROCESSORS)
    kernel = specialised(
        _SOURCES[direction],
        f"selective_scan_{direction}",
        threads=32 * warps,
        blocks_per_sm=max(8 // warps, min(per_sm, 16 // warps)),
        spreads=True,
        STORAGE_BF16=inputs.u.dtype == torch.bfloat16,
        SOFTPLUS=softplus,
        GATE=inputs.z is not None,
        DOCUMENTS=inputs.seq_idx is not None,
        **macros,
    )
    return kernel, blocks


def run_forward(
    inputs: ScanInputs, softplus: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, final state, the states before each chunk (B, chunks, E, 16), the parts' summed steps."""
    u, A = inputs.u, inputs.A
    batch, length, channels = u.shape
    y = u.new_empty(u.shape)
    final_state = A.new_empty(batch, channels, STATES)
    chunks = -(-length // _CHUNK_STEPS)
    chunk_states = A.new_empty(batch, chunks, channels, STATES) if keep_states else None
    splits = _splits(batch, length, channels)
    split_states = A.new_empty(batch, splits, channels, STATES) if splits > 1 else None
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
        kernel, blocks = _kernel(
            "forward", inputs, softplus, splits, KEEP_STATES=keep_states and not local, LOCAL=local
        )
        warps = kernel.threads // 32
        launch(
            kernel,
            call,
            blocks=blocks,
            # B and C; per warp a tile of three values, and a lane's next three inputs in two sets.
            shared_bytes=4 * (_CHUNK_STEPS * 32 + warps * 3 * 8 * WARP_CHANNELS)
            + warps * 6 * 32 * 4 * u.element_size(),
            device=u.device,
        )
        if local:
            _chain(inputs, inputs.initial_state, split_steps, split_states, backwards=False)
    return y, final_state, chunk_states, split_steps


def _chain(
    inputs: ScanInputs,
    initial: Tensor | None,
    split_steps: Tensor | None,
    split_states: Tensor | None,
    *,
    backwards: bool,
) -> None:
    assert split_steps is not None
    batch, splits, channels = split_steps.shape
    kernel = specialised(_SOURCES["chain"], "selective_scan_chain", threads=256)
    call = _ChainCall(
        *map(pointer, (inputs.A, initial, split_steps, split_states)),
        *(batch, channels, splits, int(backwards)),
    )
    blocks = -(-batch * channels * STATES // kernel.threads)
    launch(kernel, call, blocks=blocks, shared_bytes=0, device=inputs.u.device)


def _kernel_rows(inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    return inputs.u, inputs.delta, inputs.z, inputs.B, inputs.C


def _parameters(inputs: ScanInputs) -> tuple[Tensor, ...]:
    return inputs.A, inputs.D, inputs.delta_bias


def _strides(inputs: ScanInputs) -> tuple[int, ...]:
    z = (0, 0) if inputs.z is None else inputs.z.stride()[:2]
    return (
        *(*inputs.u.stride()[:2], *inputs.delta.stride()[:2], *z),
        *(*inputs.B.stride()[:3], *inputs.C.stride()[:3]),
    )


def run_backward(
    inputs: ScanInputs,
    softplus: bool,
    kept: tuple[Tensor, Tensor, Tensor | None],
    output_gradients: tuple[Tensor, Tensor | None],
    dz: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state.

    `dz` is room for z's (B, L, E), whose rows are evenly spaced; None without z.
    """
    (y, chunk_states, split_steps), (grad_y, grad_final) = kept, output_gradients
    grad_y = _aligned(grad_y.to(y.dtype), 4)
    batch, length, channels = y.shape
    groups = inputs.B.shape[2]
    splits = 1 if split_steps is None else split_steps.shape[1]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warps = _warps(channels // groups)
    tiles = channels // groups // (warps * WARP_CHANNELS) if deterministic else 1
    du, ddelta = torch.empty_like(y), torch.empty_like(y)
    dBC = inputs.A.new_zeros(tiles, batch, length, groups, 2 * STATES)
    dA = inputs.A.new_empty(batch, splits, channels, STATES)
    of_channels = inputs.A.new_empty(2, batch, splits, channels)
    dD, dbias = of_channels.unbind()
    dinitial = None if inputs.initial_state is None else torch.empty_like(inputs.initial_state)
    split_states = None if splits == 1 else torch.empty_like(dA)
    gradients = (du, ddelta, dz, dBC, dA, dD, dbias, dinitial)
    call = _BackwardCall(
        *map(pointer, (*_kernel_rows(inputs), y, grad_y, *_parameters(inputs))),
        *map(pointer, (chunk_states, grad_final, inputs.seq_idx, *gradients, split_states)),
        *_strides(inputs),
        *grad_y.stride()[:2],
        0 if dz is None else dz.stride(1) - channels,
        0 if inputs.seq_idx is None else inputs.seq_idx.stride(0),
        *(batch, length, channels, groups, splits),
    )
    # B and C; per warp six noted states, the chunk's steps, a tile of three values in two orders,
    # its part of dB and dC, two numbers a channel, and a lane's next three inputs.
    per_warp = 6 * 8 * 32 + _CHUNK_STEPS * WARP_CHANNELS + 3 * 8 * 2 * WARP_CHANNELS
    per_warp += 8 * 36 + 2 * WARP_CHANNELS + 3 * 32 * y.element_size()
    shared_bytes = 4 * (_CHUNK_STEPS * 32 + warps * per_warp)
    for local in (True, False) if splits > 1 else (False,):
        kernel, blocks = _kernel(
            "backward", inputs, softplus, splits, DETERMINISTIC=deterministic, LOCAL=local
        )
        launch(kernel, call, blocks=blocks, shared_bytes=shared_bytes, device=y.device)
        if local:
            _chain(inputs, grad_final, split_steps, split_states, backwards=True)
    dBC = dBC.sum(0) if tiles > 1 else dBC[0]
    dB, dC = dBC.to(inputs.B.dtype).chunk(2, dim=-1)
    dD, dbias = of_channels.sum((1, 2)).unbind()
    return du, ddelta, dA.sum((0, 1)), dB, dC, dD, dz, dbias, dinitial
