"""One token from logits: greedy, or sampled with temperature, top-k and top-p.

B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Generator, Tensor

from mamba_dist.errors import ConfigError, ModelError

_NOT_FINITE: Final = (
    "the model's logits are not finite, expected numbers; its weights are damaged or its training "
    "diverged"
)


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. Temperature 0 takes the most probable one and ignores the rest.

    Temperature divides the logits, then only the top_k most probable tokens stay, then of these the
    smallest set whose probability reaches top_p.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}, expected 0 or more, finite")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected above 0 and at most 1")


def sample(
    logits: Tensor, settings: SamplingSettings, *, generators: Sequence[Generator]
) -> Tensor:
    """The next token of each row, (B,) int64 on CPU.

    Each row draws one number from its own CPU generator, so what a row becomes does not depend on
    the rows beside it.

    Args:
        logits: (B, V); ids at -inf are never chosen.
        settings: how to choose.
        generators: one per row.

    Raises:
        ModelError: logits are NaN or +inf.
    """
    if settings.temperature == 0:
        _require_finite_maximum(logits)
        return logits.argmax(-1).cpu()
    cumulative = token_probabilities(logits, settings).cpu().cumsum(-1)
    draws = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    # Strictly above the draw: an id of probability 0 adds nothing and is never the first above it.
    targets = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1)


def most_probable(logits: Tensor) -> Tensor:
    """The greedy choice without waiting for the device: (2, B) int64 there.

    The first row holds the ids; the second one 1 where they mean something, and 0 where the largest
    logit is not finite. Hand what has arrived to `chosen_ids`.
    """
    largest, ids = logits.max(-1)
    return torch.stack([ids, torch.isfinite(largest).to(ids.dtype)])


def chosen_ids(choice: Sequence[Sequence[int]]) -> list[int]:
    """The ids of `most_probable`.

    Raises:
        ModelError: logits were NaN or +inf.
    """
    ids, are_finite = choice
    if not all(are_finite):
        raise ModelError(_NOT_FINITE)
    return list(ids)


def token_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities to sample from, (B, V) fp64, with zeros at excluded ids; temperature above 0.

    Raises:
        ModelError: logits are NaN or +inf.
    """
    _require_finite_maximum(logits)
    logits = logits.double()
    # The largest logit becomes 0 first, since dividing by a tiny temperature could overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature
    if settings.top_k is not None:
        values, ids = logits.topk(min(settings.top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    probabilities = logits.softmax(-1)
    if settings.top_p is None:
        return probabilities
    descending, ids = probabilities.sort(descending=True, stable=True)
    more_probable = descending.cumsum(-1) - descending
    descending = descending.masked_fill(more_probable >= settings.top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, ids, descending)
    return kept / kept.sum(-1, keepdim=True)


def _require_finite_maximum(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise ModelError(_NOT_FINITE)
