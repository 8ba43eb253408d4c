"""mamba-ssm and causal-conv1d: imported when their backend was chosen, and what all of it shares.

Importing them early would break machines without a GPU: `mamba_ssm` needs triton and a compiled
extension, and transformers picks up an importable `mamba_ssm` even where it cannot run.

B batch, L length.
"""

import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.errors import BackendError

INSTALL: Final = "pip install 'mamba-ssm>=2.3' 'causal-conv1d>=1.5'"
USE_TORCH: Final = "use engine.ops_backend: torch"
# Their offsets are 32-bit integers, which wrap without a word:
# https://github.com/state-spaces/mamba/issues/1015 and 884.
MAX_ELEMENTS: Final = 2**31 - 1

Function = Callable[..., Any]
"""A function of a package without type annotations."""


def require_packages() -> None:
    """Imports everything that the backend calls.

    Raises:
        BackendError: a package is missing or was installed without its compiled extension.
    """
    selective_scan_fn()
    mamba_chunk_scan_combined()
    causal_conv1d_fn()


def selective_scan_fn() -> Function:
    """mamba-ssm's selective scan, channels first.

    Raises:
        BackendError: it cannot be imported.
    """
    interface = _import("mamba_ssm.ops.selective_scan_interface")
    if getattr(interface, "selective_scan_cuda", None) is None:
        raise BackendError(_missing("mamba_ssm", "it was built without selective_scan_cuda"))
    return interface.selective_scan_fn  # type: ignore[no-any-return]


def mamba_chunk_scan_combined() -> Function:
    """mamba-ssm's SSD scan.

    Raises:
        BackendError: it cannot be imported.
    """
    module = _import("mamba_ssm.ops.triton.ssd_combined")
    return module.mamba_chunk_scan_combined  # type: ignore[no-any-return]


def causal_conv1d_fn() -> Function:
    """causal-conv1d's convolution, channels first.

    Raises:
        BackendError: it cannot be imported.
    """
    return _import("causal_conv1d").causal_conv1d_fn  # type: ignore[no-any-return]


def rms_norm_fn() -> Function:
    """mamba-ssm's addition and RMSNorm, which no backend of ours calls: the benchmark's peer.

    Raises:
        BackendError: it cannot be imported.
    """
    return _import("mamba_ssm.ops.triton.layer_norm").rms_norm_fn  # type: ignore[no-any-return]


def gated_rms_norm_fn() -> Function:
    """mamba-ssm's gated RMSNorm, another peer of the benchmark.

    Raises:
        BackendError: it cannot be imported.
    """
    return _import("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn  # type: ignore[no-any-return]


def mamba_lm_head_model() -> tuple[Function, Function]:
    """mamba-ssm's language model and its config, another peer of the benchmarks.

    Raises:
        BackendError: it cannot be imported.
    """
    model = _import("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
    return model, _import("mamba_ssm.models.config_mamba").MambaConfig


def keep_fp32_products() -> None:
    """Has Triton multiply fp32 matrices in fp32 precision, unless the user said otherwise.

    Its default rounds their entries to TF32's 10 bits. Three TF32 products give fp32's precision
    back on the tensor cores; "ieee" unrolls them into scalar code. The setting is the process's,
    but only kernels that leave the precision open follow it, and bf16 knows no such choice.
    """
    language = _import("triton").knobs.language
    if language.fp32_default is None:
        language.fp32_default = "tf32x3"


def refuse_fp64(op: str, tensor: Tensor) -> None:
    """Raises BackendError for an fp64 tensor, for which there are no kernels."""
    if tensor.dtype == torch.float64:
        raise BackendError(f"ops backend 'cuda' has no float64 kernel for {op}; {USE_TORCH}")


def kernel_dtype(*tensors: Tensor | None) -> torch.dtype:
    """bf16 if all given tensors are bf16, else fp32: none of them is rounded for the kernel."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


def document_numbers(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) int32, the documents of each row counted from 0, as `seq_idx` for the kernels.

    They compare ids by value, so that an id which returns would reach back to its first document;
    they take the initial state for document 0's, and an id below 0 for padding.
    """
    if seq_idx is None:
        return None
    return document_starts(seq_idx).cumsum(1, dtype=torch.int32)


def document_starts(seq_idx: Tensor) -> Tensor:
    """(B, L) bool, true where a document starts inside a row; never waits for the device."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def row_elements(tensor: Tensor) -> int:
    """Elements that a kernel steps over in one row of a (B, L, ...) tensor, gaps included."""
    return max(tensor.stride(1) * tensor.shape[1], tensor[0].numel())


def by_rows(
    batch: int,
    *,
    row_elements: int,
    op: str,
    call: Callable[[slice], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """What `call` returns for the rows given to it, for all rows, in calls of safe size.

    Args:
        batch: number of rows.
        row_elements: elements of one row in the largest tensor that the kernels address.
        op: name of the op, for the error.
        call: from rows to tensors whose first dimension is those rows.

    Raises:
        BackendError: a single row is too large.
    """
    rows = MAX_ELEMENTS // row_elements
    if rows >= batch:
        return call(slice(0, batch))
    if rows == 0:
        raise BackendError(
            f"ops backend 'cuda' can address {MAX_ELEMENTS} elements, and one row of {op} has "
            f"{row_elements}; use shorter sequences, or {USE_TORCH}"
        )
    parts = [call(slice(first, first + rows)) for first in range(0, batch, rows)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _import(name: str) -> Any:
    """The module, imported at this moment.

    Raises:
        BackendError: importing failed, in whatever way.
    """
    try:
        return importlib.import_module(name)
    # A package built for another torch, CUDA or Triton fails with almost any exception.
    except Exception as error:
        raise BackendError(_missing(name, f"{type(error).__name__}: {error}")) from error


def _missing(package: str, reason: str) -> str:
    return (
        f"ops backend 'cuda' cannot import {package} ({reason}); install it with {INSTALL}, which "
        f"needs a CUDA toolchain, or {USE_TORCH}"
    )
