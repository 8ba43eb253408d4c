"""SSD scan by mamba-ssm's Triton kernels.

They take documents, an initial state and the final state's gradient, with some care: documents are
counted from 0, chunks are powers of two, and the steps come ready-made, because the kernels'
softplus log(1 + exp(dt)) has no digits left for small dt. With bf16 inputs they multiply in bf16
and keep the states between chunks in bf16. Unlike those of the other backends, documents that
share a chunk share its running sum of dt A: their neighbours change an output's last bits, and an
infinite or NaN neighbour makes it NaN.

B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk.
"""

from typing import Final

import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.cuda_packages import (
    USE_TORCH,
    by_rows,
    document_numbers,
    keep_fp32_products,
    kernel_dtype,
    mamba_chunk_scan_combined,
    refuse_fp64,
    row_elements,
)
from mamba_dist.ops.precision import autocast_disabled
from mamba_dist.ops.ssd import torch_chunked

# Other sizes than powers of two give NaN: https://github.com/state-spaces/mamba/issues/449.
_CHUNKS: Final = (256, 128, 64)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output y (B, L, H, P) in x's dtype and final state (B, H, P, N) in fp32.

    Arguments and shapes are those of `mamba_dist.ops.ssd.ssd`; the chunk is the largest of 256, 128
    and 64 that is not longer than `chunk_size`, or 64. One step goes to the torch backend.

    Raises:
        BackendError: the kernels cannot be imported, or not do this; the message says what can.
    """
    refuse_fp64("ssd", x)
    if x.shape[1] == 1:
        return torch_chunked.ssd(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, chunk_size
        )
    dtype = kernel_dtype(x, B, C)
    chunk = next((size for size in _CHUNKS if size <= chunk_size), _CHUNKS[-1])
    with autocast_disabled(x):
        steps = _steps(dt, dt_bias, dt_softplus)
        inputs, B, C = (_unit_stride(tensor.to(dtype)) for tensor in (x, B, C))
        z = None if z is None else _unit_stride(z)
        numbers = document_numbers(seq_idx)

        def scan_rows(rows: slice) -> tuple[Tensor, Tensor]:
            outputs: tuple[Tensor, Tensor] = mamba_chunk_scan_combined()(
                inputs[rows],
                steps[rows],
                A.float(),
                B[rows],
                C[rows],
                chunk,
                D=None if D is None else D.float().contiguous(),
                z=None if z is None else z[rows],
                initial_states=None if initial_state is None else initial_state[rows].float(),
                seq_idx=None if numbers is None else numbers[rows],
                return_final_states=True,
            )
            return outputs

        if dtype.itemsize == 4:
            keep_fp32_products()
        elements = max(_between_elements(inputs, B, chunk), _elements(inputs, steps, B, C, z))
        y, final_state = by_rows(x.shape[0], row_elements=elements, op="ssd", call=scan_rows)
        return y.to(x.dtype), final_state


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """(B, L, H) fp32, the steps that the recurrence takes.

    Raises:
        BackendError: a step is negative, for which the kernels would clamp the state's growth.
    """
    steps = dt.float()
    if bias is not None:
        steps = steps + bias.float()
    if softplus:
        return F.softplus(steps)
    if bool((steps < 0).any()):
        raise BackendError(
            f"dt is {steps.min().item():g} at its least, and mamba-ssm's SSD kernels take no "
            f"negative steps; use dt_softplus, or {USE_TORCH}"
        )
    return steps


def _unit_stride(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _elements(*tensors: Tensor | None) -> int:
    """Elements per row of the largest tensor."""
    return max(row_elements(tensor) for tensor in tensors if tensor is not None)


def _between_elements(x: Tensor, B: Tensor, chunk: int) -> int:
    """Elements per row of the largest tensor between the kernels."""
    _, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    chunks = -(-length // chunk)
    return chunks * max(heads * headdim * d_state, groups * chunk * chunk, heads * chunk)
