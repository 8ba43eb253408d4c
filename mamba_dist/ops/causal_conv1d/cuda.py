"""Causal convolution by causal-conv1d's CUDA kernels, which see our layout through strides.

Not all of its versions take documents and an initial state at once, so an initial state becomes
inputs before the row, whose outputs are dropped. The final state is a copy of inputs and needs no
kernel.

B batch, L length, E channels, K kernel width.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.causal_conv1d import torch_chunked
from mamba_dist.ops.cuda_packages import (
    USE_TORCH,
    by_rows,
    causal_conv1d_fn,
    document_numbers,
    refuse_fp64,
    row_elements,
)
from mamba_dist.ops.precision import autocast_disabled

_WIDTHS: Final = range(2, 5)
# Of strides and channels, for loads of 16 bytes, which is also how the memory has to be aligned.
_MULTIPLE: Final = 8
_ALIGNMENT_BYTES: Final = 16


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.causal_conv1d.causal_conv1d`; the outputs see
    an initial state in x's dtype, which holds what a final state of the same dtype was made of.
    One step goes to the torch backend.

    Raises:
        BackendError: the kernels cannot be imported, or not do this; the message says what can.
    """
    refuse_fp64("causal_conv1d", x)
    (batch, length, channels), width = x.shape, weight.shape[1]
    if length == 1:
        return torch_chunked.causal_conv1d(
            x, weight, bias, seq_idx, initial_state, return_final_state, silu
        )
    if width not in _WIDTHS or channels % _MULTIPLE:
        raise BackendError(
            f"the convolution has {channels} channels and width {width}; causal-conv1d takes a "
            f"multiple of {_MULTIPLE} channels and width 2 to 4; {USE_TORCH}"
        )
    with autocast_disabled(x):
        numbers = document_numbers(seq_idx)
        inputs, documents = x, numbers
        if initial_state is not None:
            inputs = torch.cat([initial_state.mT.to(x.dtype), x], dim=1)
            documents = None if numbers is None else F.pad(numbers, (width - 1, 0))
        inputs = _aligned(inputs)

        def convolve(rows: slice) -> tuple[Tensor]:
            y: Tensor = causal_conv1d_fn()(
                inputs[rows].mT,
                weight.float().contiguous(),
                None if bias is None else bias.float().contiguous(),
                seq_idx=None if documents is None else documents[rows],
                activation="silu" if silu else None,
            )
            return (y.mT,)

        (y,) = by_rows(batch, row_elements=row_elements(inputs), op="causal_conv1d", call=convolve)
        if initial_state is not None:
            y = y[:, -length:]
        if not return_final_state:
            return y, None
        return y, _final_state(x, numbers, initial_state, width)


def _aligned(x: Tensor) -> Tensor:
    """x itself if the kernels can read it in place, else a copy that they can."""
    if (
        x.stride(2) == 1
        and x.stride(0) % _MULTIPLE == 0
        and x.stride(1) % _MULTIPLE == 0
        and x.data_ptr() % _ALIGNMENT_BYTES == 0
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _final_state(
    x: Tensor, numbers: Tensor | None, initial_state: Tensor | None, width: int
) -> Tensor:
    """The last K - 1 inputs (B, E, K - 1), zero where they belong to an earlier document."""
    kept = width - 1
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], kept, dtype=torch.float32)
    window = torch.cat([initial_state.mT.float(), x[:, -kept:].float()], dim=1)[:, -kept:]
    if numbers is not None:
        documents = F.pad(numbers, (kept, 0))[:, -kept:]
        window = window.masked_fill((documents != numbers[:, -1:])[..., None], 0.0)
    return window.mT.contiguous()
