"""Cross entropy of the language-model head's logits, without the logits of all positions at once.

B batch, L length, D d_model, V rows of the head (padded vocabulary).
"""

from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from mamba_dist.ops.arguments import check_device, check_floating, check_rank, check_shape
from mamba_dist.ops.backend import implementation
from mamba_dist.ops.cross_entropy import cpu, gpu, reference, torch_chunked

_IMPLEMENTATIONS: Final = MappingProxyType(
    {
        "reference": reference.linear_cross_entropy,
        "torch": torch_chunked.linear_cross_entropy,
        "cpu": cpu.linear_cross_entropy,
        "gpu": gpu.linear_cross_entropy,
        # mamba-ssm has none.
        "cuda": torch_chunked.linear_cross_entropy,
    }
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    backend: str = "torch",
) -> Tensor:
    """Scalar fp32 (fp64 for fp64 hidden): the SUM of -log p(label) over labels other than -100.

    p is the softmax over the first `vocab_size` rows of hidden @ weight^T. Under autocast the
    matmuls run in its dtype, or in fp32 on a CPU without bf16 instructions; the softmax is always
    fp32 or fp64. hidden and weight have gradients.

    Args:
        hidden: (B, L, D).
        weight: (V, D); rows from `vocab_size` on are padding and get a zero gradient.
        labels: (B, L) int64, below `vocab_size`; -100 where nothing is to be predicted.
        vocab_size: rows that take part in the softmax, all V by default.
        backend: a name from `resolve_backend`.

    Raises:
        ValueError: a shape, dtype, the vocabulary size or the backend name is wrong.
    """
    check_rank("hidden", hidden, "B, L, D")
    check_rank("weight", weight, "V, D")
    check_shape("weight", weight, weight.shape[0], hidden.shape[2])
    check_shape("labels", labels, *hidden.shape[:2])
    check_floating(hidden=hidden, weight=weight)
    check_device(hidden, labels)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}, expected torch.int64")
    rows = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= rows <= weight.shape[0]:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected 1 to {weight.shape[0]}, the rows of weight"
        )
    return implementation(_IMPLEMENTATIONS, backend)(hidden, weight, labels, rows)
