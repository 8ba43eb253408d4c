"""The samples of a split: which tokens each training sequence holds, from its number, in O(1).

concat    the stream of all documents, cut every L tokens. The last token of a sample is the label
          of the one before and the first input of the next sample. What is left at the end, fewer
          than L+1 tokens, is left out of training unless it is all there is; validation pads it.
best_fit, pad    what a plan says that was made beforehand, see planning.py; every label of the
          split comes once an epoch, and an EOS is never an input.

Validation is concat whatever the training split is, so that the losses of runs can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mamba_dist.data.dataset import TokenDataset, TokenStream
from mamba_dist.data.packing_plan import PackingPlan, Span, open_plan, plan_key
from mamba_dist.errors import DataError

if TYPE_CHECKING:
    # Loader processes import this module, and have no other use for pydantic.
    from mamba_dist.config.schema import Packing


class Samples(Protocol):
    """The samples of one split of one data set; `len()` of them make an epoch."""

    @property
    def stream(self) -> TokenStream:
        """The split that they are made of."""

    @property
    def length(self) -> int:
        """Positions L of a sample."""

    def __len__(self) -> int: ...

    def spans(self, sample: int) -> Sequence[Span]:
        """What a sample holds, from its first position on; what it leaves of L is padding.

        Raises:
            DataError: a plan is damaged there.
        """


@dataclass(frozen=True)
class ConcatSamples:
    """Windows of `length` tokens; `pad_tail` counts an incomplete last one too."""

    stream: TokenStream
    length: int
    pad_tail: bool

    def __len__(self) -> int:
        return count_windows(self.stream.tokens, self.length, pad_tail=self.pad_tail)

    def spans(self, sample: int) -> Sequence[Span]:
        start = sample * self.length
        return (Span(start, min(self.length, self.stream.tokens - start)),)


@dataclass(frozen=True)
class PlannedSamples:
    """The samples of a plan."""

    stream: TokenStream
    plan: PackingPlan

    @property
    def length(self) -> int:
        return self.plan.key.sequence_length

    def __len__(self) -> int:
        return len(self.plan)

    def spans(self, sample: int) -> Sequence[Span]:
        return self.plan.spans(sample)


def count_windows(tokens: int, length: int, *, pad_tail: bool) -> int:
    """Windows of `length` inputs in so many tokens; `pad_tail` counts the incomplete last one."""
    if tokens < 2:
        return 0  # nothing to predict
    full, tail = divmod(tokens - 1, length)
    return full + 1 if tail and (pad_tail or full == 0) else full


def training_samples(dataset: TokenDataset, *, packing: "Packing", length: int) -> Samples:
    """The samples of the training split, of `length` positions each.

    Raises:
        DataError: there is none, or their plan is missing, damaged or of another data set.
    """
    return _some(dataset, "train", _open_training(dataset, packing, length))


def validation_samples(dataset: TokenDataset, length: int) -> Samples:
    """The samples of the validation split: concat, its tail padded.

    Raises:
        DataError: there is none.
    """
    return _some(dataset, "val", ConcatSamples(dataset.val, length, pad_tail=True))


def _open_training(dataset: TokenDataset, packing: "Packing", length: int) -> Samples:
    if packing == "concat":
        return ConcatSamples(dataset.train, length, pad_tail=False)
    key = plan_key(dataset.fingerprint, packing, length)
    return PlannedSamples(dataset.train, open_plan(dataset.path, key))


def _some(dataset: TokenDataset, split: str, samples: Samples) -> Samples:
    if len(samples) == 0:
        raise DataError(
            f"{dataset.path} has {dataset.manifest.tokens(split)} {split} tokens, too few to "
            "predict any; tokenize a larger corpus"
        )
    return samples
