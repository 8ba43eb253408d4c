"""Truth for the head's cross entropy: all logits at once, PyTorch's own loss.

B batch, L length, D d_model, V rows of the head.
"""

import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.precision import compute_dtype


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Scalar sum of -log p over labels other than -100; arguments as in the package."""
    logits = F.linear(hidden, weight[:vocab_size]).to(compute_dtype(hidden))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
