"""One step of the scans' recurrences by one kernel of our own, for decoding; see `state_step.cu`.

B batch, E channels, H heads of P channels, N d_state, G groups; the selective scan has H = E.
"""

import ctypes
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mamba_dist.ops.native.call import is_unobserved, pointer, taken_over, unit_stride
from mamba_dist.ops.nvrtc.kernel import Kernel, call_fields, launch, specialised

MOST_STATES: Final = 256
"""Of a channel, which one step can take."""
_SOURCE: Final = Path(__file__).with_suffix(".cu")
_WARP: Final = 32
_FOUR: Final = 4
# Fours of states that a lane holds at a time.
_MOST_HELD: Final = 4
_MULTIPROCESSORS: Final = 132
# Below, more lanes that wait for memory are worth more than what a lane need not read twice.
_WARPS_WANTED: Final = 16 * _MULTIPROCESSORS
_LARGEST_BLOCK: Final = 128
_RESIDENT_THREADS: Final = 768


class _Call(ctypes.Structure):
    """`Call` of state_step.cu."""

    _fields_ = call_fields(
        ("x", "dt", "B", "C", "z", "A", "D", "bias", "before", "y", "after"),
        ("x_row", "dt_row", "B_row", "B_group", "C_row", "C_group", "z_row", "batch"),
    )


class StepInputs(NamedTuple):
    """The tensors of one step, any floating dtype but fp64.

    x: (B, E).
    dt: (B, H), before bias and softplus.
    A: (H, N) for the selective scan, (H,) for SSD.
    B: (B, G, N).
    C: (B, G, N).
    D: (H,).
    z: (B, E), gate.
    bias: (H,), added to dt.
    state: (B, E, N), the state before.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    state: Tensor | None


def is_plain_step(length: int, *tensors: Tensor | None) -> bool:
    """Whether a call has one position, which nobody differentiates or traces."""
    # A compiler's lengths may be symbols.
    if torch.compiler.is_compiling() or length != 1 or not is_unobserved(*tensors):
        return False
    wanted = torch.is_grad_enabled()
    return not (wanted and any(t is not None and t.requires_grad for t in tensors))


def state_step(
    inputs: StepInputs, *, softplus: bool, A_is_log: bool, donate_state: bool
) -> tuple[Tensor, Tensor]:
    """Output y (B, E) in x's dtype and the state after the step (B, E, N) in fp32, at most 256 N.

    bf16 and fp32 are read as they are, other dtypes and mixtures through fp32; B, C, x, dt and z
    through any strides of rows.

    Args:
        inputs: what the step reads.
        softplus: dt = softplus(dt + bias).
        A_is_log: `inputs.A` is A_log, with A = -exp(A_log).
        donate_state: the state before may be overwritten. If it is fp32 and contiguous, the state
            after takes its memory.

    Raises:
        BackendError: the kernel cannot be compiled or run here.
    """
    given = inputs
    inputs = _prepared(given)
    (batch, channels), d_state = inputs.x.shape, inputs.B.shape[2]
    y = inputs.x.new_empty(batch, channels)
    in_place = taken_over(given.state, donated=donate_state and inputs.state is given.state)
    after = inputs.state if in_place else inputs.A.new_empty(batch, channels, d_state)
    assert after is not None
    z_row = 0 if inputs.z is None else inputs.z.stride(0)
    call = _Call(
        *map(pointer, (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)),
        *map(pointer, (inputs.A, inputs.D, inputs.bias, inputs.state, y, after)),
        *(inputs.x.stride(0), inputs.dt.stride(0)),
        *(*inputs.B.stride()[:2], *inputs.C.stride()[:2], z_row, batch),
    )
    kernel, blocks = _kernel(inputs, after, softplus=softplus, A_is_log=A_is_log)
    launch(kernel, call, blocks=blocks, shared_bytes=0, device=y.device)
    return y.to(given.x.dtype), after


def _prepared(inputs: StepInputs) -> StepInputs:
    """Rows of one dtype whose elements lie side by side; the rest in fp32, contiguous."""
    rows = (inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z)
    narrow = all(row is None or row.dtype == torch.bfloat16 for row in rows)
    storage = torch.bfloat16 if narrow else torch.float32
    x, dt, B, C = (unit_stride(row.to(storage)) for row in rows[:4] if row is not None)
    D, bias, state = (
        None if tensor is None else tensor.float().contiguous()
        for tensor in (inputs.D, inputs.bias, inputs.state)
    )
    z = None if inputs.z is None else unit_stride(inputs.z.to(storage))
    return StepInputs(x, dt, inputs.A.float().contiguous(), B, C, D, z, bias, state)


def _kernel(
    inputs: StepInputs, after: Tensor, *, softplus: bool, A_is_log: bool
) -> tuple[Kernel, int]:
    """The kernel specialised for the inputs, and its number of blocks; by shapes alone."""
    (batch, channels), (groups, d_state) = inputs.x.shape, inputs.B.shape[1:]
    fours = -(-d_state // _FOUR)
    lanes = min(_WARP, 1 << (fours - 1).bit_length())
    is_per_head = inputs.A.dim() == 1
    headdim = channels // inputs.dt.shape[1]
    shared_by = headdim if is_per_head else batch
    most = min(lanes, _MOST_HELD // -(-fours // lanes), shared_by)
    items = _items(
        most, batch * channels * lanes // _WARP, divisors_of=headdim if is_per_head else 0
    )
    rows, run = (1, items) if is_per_head else (items, 1)
    threads_wanted = -(-batch // rows) * (channels // run) * lanes
    threads = _LARGEST_BLOCK
    while threads > _WARP and threads_wanted < 2 * _MULTIPROCESSORS * threads:
        threads //= 2
    kernel = specialised(
        _SOURCE,
        "state_step",
        threads=threads,
        blocks_per_sm=_RESIDENT_THREADS // threads,
        STORAGE_BF16=inputs.x.dtype == torch.bfloat16,
        PER_HEAD=is_per_head,
        CHANNELS=channels,
        HEADDIM=headdim,
        GROUPS=groups,
        STATES=d_state,
        LANES=lanes,
        ROWS=rows,
        RUN=run,
        SOFTPLUS=softplus,
        GATE=inputs.z is not None,
        WHOLE=_is_whole(inputs, after),
        A_LOG=A_is_log,
    )
    return kernel, -(-batch // rows) * -(-(channels // run) // (threads // lanes))


def _items(most: int, warps: int, *, divisors_of: int) -> int:
    """Rows or channels of a lane, which share what it reads besides their states."""
    return next(
        n
        for n in (4, 2, 1)
        if n == 1 or (n <= most and warps >= n * _WARPS_WANTED and divisors_of % n == 0)
    )


def _is_whole(inputs: StepInputs, after: Tensor) -> bool:
    """Whether all that is read by state lies in whole fours at aligned addresses."""
    by_state = [inputs.B, inputs.C, after]
    if inputs.A.dim() == 2:
        by_state.append(inputs.A)
    if inputs.state is not None:
        by_state.append(inputs.state)
    return all(map(_lies_in_fours, by_state))


def _lies_in_fours(tensor: Tensor) -> bool:
    # The stride of an axis of one entry may be anything, and is never used.
    axes = range(tensor.dim() - 1)
    strides = [tensor.stride(axis) for axis in axes if tensor.shape[axis] > 1]
    in_steps = all(number % _FOUR == 0 for number in (tensor.shape[-1], *strides))
    return in_steps and tensor.data_ptr() % (_FOUR * tensor.element_size()) == 0
