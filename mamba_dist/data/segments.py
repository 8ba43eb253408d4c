"""The order of a whole run: global sample position g → (source, epoch, number), a pure function.

A run is a list of segments; a new one begins where its mixture or its batch size was changed, or
where samples are passed over. All of it stands in every checkpoint, as records of a few lines.
Within a segment the mixture gives position g a source (mixture.py), and the source's own order
(order.py) the sample. A source is known by its fingerprint and goes on from segment to segment
where it stood, even after one in which it was left out, so that no sample comes twice in an epoch
of its source.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from mamba_dist.data.mixture import Mixture
from mamba_dist.data.order import SampleOrder


@dataclass(frozen=True)
class SourceContent:
    """What a data set held when the run read it, to say what changed if it does."""

    train_tokens: int
    train_documents: int
    val_tokens: int
    val_documents: int
    shards: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    train_split: float
    val_split: float


@dataclass(frozen=True)
class SourceRecord:
    """One data set in a segment.

    `samples` is their number in an epoch; `taken` how many the run had read when the mixture began;
    `order_key` tells its order from those of the others, "" for the one a run began with alone.
    """

    path: str
    fingerprint: str
    weight: float
    max_epochs: int | None
    samples: int
    content: SourceContent
    taken: int = 0
    order_key: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of optimizer steps with one mixture and one batch size.

    `mixture_position` is where the mixture began: earlier than `first_position` if only the batch
    size changed there, or samples were passed over, since they then go on in the same order.
    """

    first_step: int
    first_position: int
    global_batch_size: int
    mixture_position: int
    sources: tuple[SourceRecord, ...]

    def reads_like(self, other: "Segment") -> bool:
        """Whether both read one mixture in one batch size, however far into it."""
        return (self.global_batch_size, self.mixture_position, self.sources) == (
            other.global_batch_size,
            other.mixture_position,
            other.sources,
        )


class Sample(NamedTuple):
    """One sample of a run: `number` in `epoch` of the source of that index in the segment."""

    segment: int
    source: int
    epoch: int
    number: int


class RunOrder:
    """Where every sample of a run comes from."""

    def __init__(self, segments: Iterable[Segment], *, seed: int, shuffle: bool) -> None:
        self.segments = tuple(segments)
        if not self.segments:
            raise ValueError("a run has at least one segment")
        self.seed, self.shuffle = seed, shuffle
        self._mixtures = [_mixture(segment) for segment in self.segments]
        self._orders = [
            [SampleOrder(s.samples, seed, shuffle, s.order_key) for s in segment.sources]
            for segment in self.segments
        ]

    @property
    def end(self) -> int | None:
        """The position at which all sources of the last segment are exhausted, None if never."""
        end = self._mixtures[-1].end
        return None if end is None else self.segments[-1].mixture_position + end

    def locate(self, position: int) -> Sample:
        """The sample at a global position.

        Raises:
            ValueError: the position is before the beginning of the run, or after its `end`.
        """
        if position < 0:
            raise ValueError(f"position {position} is before the beginning of the run")
        index = bisect_right(self.segments, position, key=lambda s: s.first_position) - 1
        segment = self.segments[index]
        source, number = self._mixtures[index].locate(position - segment.mixture_position)
        taken = segment.sources[source].taken
        epoch, sample = self._orders[index][source].locate(taken + number)
        return Sample(index, source, epoch, sample)

    def positions(self, step: int) -> range:
        """The global positions that an optimizer step reads, over all ranks."""
        segment = self.segments[self._segment_of(step)]
        first = segment.first_position + (step - segment.first_step) * segment.global_batch_size
        return range(first, first + segment.global_batch_size)

    def segments_from(self, step: int) -> tuple[Segment, ...]:
        """The segment that a step belongs to, and all later ones.

        Raises:
            ValueError: the step is before the beginning of the run.
        """
        return self.segments[self._segment_of(step) :]

    @property
    def passed_over(self) -> int:
        """Positions before the last segment that no step reads."""
        return self.segments[-1].first_position - sum(
            (after.first_step - before.first_step) * before.global_batch_size
            for before, after in pairwise(self.segments)
        )

    def taken(self, position: int) -> dict[str, int]:
        """By fingerprint, the samples of each source before a position, over all segments; those
        that were passed over count as taken."""
        found: dict[str, int] = {}
        ends = [s.first_position for s in self.segments[1:]] + [position]
        for segment, mixture, end in zip(self.segments, self._mixtures, ends, strict=True):
            if segment.first_position > position:
                break
            counts = mixture.counts(min(end, position) - segment.mixture_position)
            for source, count in zip(segment.sources, counts, strict=True):
                found[source.fingerprint] = source.taken + count
        return found

    def changed(
        self, *, step: int, sources: Sequence[SourceRecord] | None, global_batch_size: int
    ) -> "RunOrder":
        """The order with a new segment from a step on; `sources` None keeps the mixture.

        Each source goes on where it stood at that step, and keeps its order.
        """
        before = [s for s in self.segments if s.first_step < step]
        position = self.positions(step).start
        last = self.segments[-1]
        if sources is None:
            sources, mixture_position = last.sources, last.mixture_position
        else:
            keys = {s.fingerprint: s.order_key for one in self.segments for s in one.sources}
            taken = self.taken(position)
            mixture_position = position
            sources = [
                replace(
                    source,
                    taken=taken.get(source.fingerprint, 0),
                    order_key=keys.get(source.fingerprint, source.fingerprint),
                )
                for source in sources
            ]
        segment = Segment(
            step, position, global_batch_size, mixture_position, in_order_of_mixture(sources)
        )
        return RunOrder([*before, segment], seed=self.seed, shuffle=self.shuffle)

    def without(self, steps: range) -> "RunOrder":
        """The order that passes over the samples of `steps`: the first of these reads what came
        after the last, and so on. What is passed over later on stays so.

        Raises:
            ValueError: the batch size or the mixture changes in these steps or later.
        """
        now, *later = self.segments_from(steps.start)
        if not all(segment.reads_like(now) for segment in later):
            raise ValueError(f"{steps} begins before {self.segments[-1]}")
        gap = replace(now, first_step=steps.start, first_position=self.positions(steps[-1]).stop)
        before = [s for s in self.segments if s.first_step < steps.start]
        after = [
            replace(s, first_step=s.first_step - len(steps))
            for s in later
            if s.first_step > steps[-1]
        ]
        if after and after[0].first_step == steps.start:
            # The samples of the very next steps are passed over already.
            return RunOrder([*before, *after], seed=self.seed, shuffle=self.shuffle)
        return RunOrder([*before, gap, *after], seed=self.seed, shuffle=self.shuffle)

    def moved(self, paths: Mapping[str, str]) -> "RunOrder":
        """The same order, with the places where its sources lie now, by fingerprint.

        Those that are not among them keep the place that is recorded.
        """
        segments = [
            replace(
                segment,
                sources=tuple(
                    replace(s, path=paths.get(s.fingerprint, s.path)) for s in segment.sources
                ),
            )
            for segment in self.segments
        ]
        return RunOrder(segments, seed=self.seed, shuffle=self.shuffle)

    def _segment_of(self, step: int) -> int:
        index = bisect_right(self.segments, step, key=lambda s: s.first_step) - 1
        if index < 0:
            raise ValueError(f"step {step} is before the beginning of the run")
        return index


def first_segment(sources: Sequence[SourceRecord], *, global_batch_size: int) -> Segment:
    """The segment that a run begins with."""
    if len(sources) > 1:
        sources = [replace(source, order_key=source.fingerprint) for source in sources]
    return Segment(0, 0, global_batch_size, 0, in_order_of_mixture(sources))


def mixture_fingerprint(sources: Sequence[SourceRecord]) -> str:
    """The fingerprint of a single source, or one for all of several, in any order."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(" ".join(sorted(s.fingerprint for s in sources)).encode()).hexdigest()


def in_order_of_mixture(sources: Iterable[SourceRecord]) -> tuple[SourceRecord, ...]:
    """The sources by fingerprint: in which order a config lists them must not matter."""
    return tuple(sorted(sources, key=lambda source: source.fingerprint))


def shares(sources: Sequence[SourceRecord]) -> dict[str, Fraction]:
    """By fingerprint, the exact share of each source while none is exhausted."""
    weights = {source.fingerprint: exact_weight(source.weight) for source in sources}
    total = sum(weights.values())
    return {fingerprint: weight / total for fingerprint, weight in weights.items()}


def exact_weight(weight: float) -> Fraction:
    """The decimal number that was written: 0.7 is 7/10, not the double next to it."""
    return Fraction(repr(weight))


def content_differences(before: SourceContent, now: SourceContent) -> str:
    """What changed between two states of a data set, in words."""
    lines = []
    for field in fields(SourceContent):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new:
            name = field.name.replace("_", " ")
            lines.append(f"{name} was {_shown(old)}, is {_shown(new)}")
    if not lines:
        return "all counts are the same, but not the contents of the shards"
    if before.tokenizer_sha256 == now.tokenizer_sha256:
        lines.append("the tokenizer is the same")
    return "; ".join(lines)


def _shown(value: int | float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)[:12]


def _mixture(segment: Segment) -> Mixture:
    return Mixture(
        [exact_weight(source.weight) for source in segment.sources],
        [
            None if s.max_epochs is None else max(0, s.max_epochs * s.samples - s.taken)
            for s in segment.sources
        ],
    )
