"""One step of the causal convolution by a kernel of its own, for decoding; see `gpu_step.cu`.

B batch, E channels, K kernel width.
"""

import ctypes
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.native.call import pointer, taken_over, unit_stride
from mamba_dist.ops.nvrtc.kernel import call_fields, launch, specialised

_SOURCE: Final = Path(__file__).with_name("gpu_step.cu")
_VECTOR: Final = 4
_THREADS: Final = 128
_SMALL_BLOCK_THREADS: Final = 32
_RESIDENT_THREADS: Final = 1024
# Lanes for which a large GPU has room; fewer than these have one channel each.
_LANES_WANTED: Final = 132 * 256


class _Call(ctypes.Structure):
    """`Call` of gpu_step.cu."""

    _fields_ = call_fields(
        ("x", "weight", "bias", "initial_state", "y", "final_state"), ("x_row", "batch")
    )


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    return_final_state: bool,
    silu: bool,
    donate_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32, K 2 to 4.

    Args:
        x: (B, E); bf16 and fp32 are read as they are, other dtypes through fp32.
        weight: (E, K).
        bias: (E,).
        initial_state: (B, E, K - 1), the inputs before, oldest first.
        return_final_state: also return the last K - 1 inputs.
        silu: apply SiLU.
        donate_state: the initial state may be overwritten. If it is fp32 and contiguous, it is the
            final state.

    Raises:
        BackendError: the kernel cannot be compiled or run here.
    """
    inputs = unit_stride(x if x.dtype == torch.bfloat16 else x.float())
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    before = None if initial_state is None else initial_state.float().contiguous()
    batch, channels = x.shape
    y, after = inputs.new_empty(batch, channels), None
    if return_final_state:
        is_same = before is initial_state
        after = before if taken_over(before, donated=donate_state and is_same) else None
        if after is None:
            after = weight.new_empty(batch, channels, weight.shape[1] - 1)
    states = tuple(t for t in (before, after) if t is not None)
    vector = _vector(inputs, weight, bias, states)
    if weight.shape[1] % _VECTOR == 0 and weight.data_ptr() % 16:
        weight = weight.clone()
    runs = channels // vector
    threads = _THREADS if batch * runs >= _LANES_WANTED else _SMALL_BLOCK_THREADS
    kernel = specialised(
        _SOURCE,
        "causal_conv1d_step",
        threads=threads,
        blocks_per_sm=_RESIDENT_THREADS // threads,
        STORAGE_BF16=inputs.dtype == torch.bfloat16,
        CHANNELS=channels,
        VECTOR=vector,
        WIDTH=weight.shape[1],
        SILU=silu,
        WHOLE=vector == _VECTOR,
    )
    call = _Call(*map(pointer, (inputs, weight, bias, before, y, after)), inputs.stride(0), batch)
    launch(kernel, call, blocks=batch * -(-runs // threads), shared_bytes=0, device=x.device)
    return y.to(x.dtype), after


def _vector(x: Tensor, weight: Tensor, bias: Tensor | None, states: tuple[Tensor, ...]) -> int:
    """Channels of a lane: few lanes wait for memory only, and many should ask for much at once."""
    batch, channels = x.shape
    if channels % _VECTOR or batch * channels < _VECTOR * _LANES_WANTED:
        return 1
    in_steps = batch == 1 or x.stride(0) % _VECTOR == 0
    in_place = x.data_ptr() % (_VECTOR * x.element_size()) == 0
    vectors = (weight, *states) if bias is None else (weight, bias, *states)
    whole = in_steps and in_place and all(t.data_ptr() % 16 == 0 for t in vectors)
    return _VECTOR if whole else 1
