import time
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from itertools import count, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.data.batch import SampleId
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.prefetch import MicrostepPlan
from mamba_dist.data.segments import (
    RunOrder,
    Sample,
    SourceContent,
    SourceRecord,
    content_differences,
    first_segment,
    mixture_fingerprint,
    shares,
)

CONTENT = SourceContent(1_234_567, 10, 99, 3, 2, "a" * 64, 320, 0, 0.9, 0.1)
WORLDS = (1, 2, 4, 8)
PINNED = [
    ("a", 0, 0),
    ("b", 0, 3),
    ("a", 0, 5),
    ("c", 0, 4),
    ("a", 0, 1),
    ("b", 0, 0),
    ("a", 0, 4),
    ("c", 0, 0),
    ("a", 0, 3),
    ("b", 0, 2),
    ("a", 0, 8),
    ("c", 0, 2),
]


def source(
    name: str, samples: int, weight: float = 1.0, max_epochs: int | None = None
) -> SourceRecord:
    return SourceRecord(f"data/{name}", name, weight, max_epochs, samples, CONTENT)


def run(sources: list[SourceRecord], batch: int = 8, seed: int = 0) -> RunOrder:
    return RunOrder([first_segment(sources, global_batch_size=batch)], seed=seed, shuffle=True)


def named(order: RunOrder, position: int) -> tuple[str, int, int]:
    """(source, epoch, number) at a position, whichever segment it lies in."""
    found = order.locate(position)
    segment = order.segments[found.segment]
    return segment.sources[found.source].fingerprint, found.epoch, found.number


def read(order: RunOrder, steps: range) -> list[tuple[str, int, int]]:
    return [named(order, position) for step in steps for position in order.positions(step)]


@st.composite
def mixtures(draw: st.DrawFn, *, limited: bool = True) -> list[SourceRecord]:
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))
    weights = st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.25, 0.7, 1e-3]))
    # The first repeats for ever, so that the run has no end; a source's size is its own.
    return [
        source(
            name,
            5 + 7 * (ord(name) - ord("a")),
            draw(weights),
            draw(st.one_of(st.none(), st.integers(1, 3))) if limited and index else None,
        )
        for index, name in enumerate(names)
    ]


@st.composite
def histories(draw: st.DrawFn) -> RunOrder:
    """A run whose mixture, batch size, or both are changed up to three times, at any step."""
    order = run(draw(mixtures()), draw(st.integers(1, 12)), draw(st.integers(0, 2**63 - 1)))
    step = 0
    for _ in range(draw(st.integers(0, 3))):
        step += draw(st.integers(1, 12))
        order = order.changed(
            step=step,
            sources=draw(st.one_of(st.none(), mixtures())),
            global_batch_size=draw(st.integers(1, 12)),
        )
    return order


def require_whole_epochs(samples: list[tuple[str, int, int]], sizes: dict[str, int]) -> None:
    """Of each source, one epoch after another, and every sample of an epoch once."""
    by_source = defaultdict(list)
    for name, epoch, number in samples:
        by_source[name].append((epoch, number))
    for name, found in by_source.items():
        size = sizes[name]
        for start in range(0, len(found), size):
            epoch = found[start : start + size]
            assert {e for e, _ in epoch} == {start // size}
            numbers = [number for _, number in epoch]
            assert len(set(numbers)) == len(numbers)
            assert set(numbers) <= set(range(size))


@settings(deadline=None, max_examples=60)
@given(order=histories())
def test_no_sample_comes_twice_in_an_epoch_whatever_is_changed_on_the_way(order: RunOrder) -> None:
    sizes = {s.fingerprint: s.samples for one in order.segments for s in one.sources}
    samples = read(order, range(60))
    require_whole_epochs(samples, sizes)
    limits = {s.fingerprint: s.max_epochs for s in order.segments[-1].sources}
    last = samples[order.segments[-1].first_position :]
    for name, epoch, _ in last:
        assert limits[name] is None or epoch < limits[name]
    for position in range(0, len(samples), 17):
        counts = order.taken(position)
        for name, _, _ in samples[:position]:
            counts[name] -= 1
        assert set(counts.values()) <= {0}
    taken = order.taken(len(samples))
    assert taken == {name: sum(1 for each, _, _ in samples if each == name) for name in taken}


@settings(deadline=None, max_examples=60)
@given(order=histories())
def test_steps_cut_the_positions_without_gap_and_a_resumed_run_goes_on_alike(
    order: RunOrder,
) -> None:
    for step, following in pairwise(range(60)):
        assert order.positions(step).stop == order.positions(following).start
    for index, segment in enumerate(order.segments):
        # What a checkpoint within this segment knows is enough, up to the next change.
        known = RunOrder(order.segments[: index + 1], seed=order.seed, shuffle=True)
        end = order.segments[index + 1].first_step if order.segments[index + 1 :] else 60
        steps = range(segment.first_step, end)
        assert read(known, steps) == read(order, steps)


@settings(deadline=None, max_examples=60)
@given(order=histories(), data=st.data())
def test_samples_that_are_passed_over_come_never_and_all_others_in_their_order(
    order: RunOrder, data: st.DataObject
) -> None:
    """However often the run goes back, to whichever step of the last mixture."""
    began = order.segments[-1]
    size, bad = began.global_batch_size, set[int]()
    for _ in range(data.draw(st.integers(1, 4))):
        first = began.first_step + data.draw(st.integers(0, 20))
        steps = range(first, first + data.draw(st.integers(1, 5)))
        gone = range(order.positions(steps[0]).start, order.positions(steps[-1]).stop)
        before = [order.positions(step) for step in range(first)]
        order = order.without(steps)
        assert before == [order.positions(step) for step in range(first)]
        bad |= set(gone)
    found = [p for step in range(began.first_step, 80) for p in order.positions(step)]
    expected = (p for p in count(began.first_position) if p not in bad)
    assert found == list(islice(expected, len(found)))
    assert order.passed_over == len(bad) == len(bad) // size * size
    assert all(one.first_step < next_one.first_step for one, next_one in pairwise(order.segments))
    # What comes later reads on where the run stands, having left out what it left out.
    changed = order.changed(step=80, sources=None, global_batch_size=size + 1)
    assert changed.positions(80).start == found[-1] + 1
    assert changed.passed_over == order.passed_over


def test_steps_of_an_earlier_mixture_cannot_be_passed_over() -> None:
    order = run([source("a", 50)], 4).changed(step=6, sources=None, global_batch_size=8)
    with pytest.raises(ValueError, match=r"range\(5, 7\) begins before Segment"):
        order.without(range(5, 7))


@settings(deadline=None, max_examples=60)
@given(order=histories(), data=st.data())
def test_every_world_and_micro_batch_reads_the_same_samples_in_a_step(
    order: RunOrder, data: st.DataObject
) -> None:
    micro = data.draw(st.sampled_from([1, 2, 3]))
    accumulation = data.draw(st.sampled_from([8, 16]))
    step = order.segments[-1].first_step + data.draw(st.integers(1, 40))
    order = order.changed(step=step, sources=None, global_batch_size=micro * accumulation)
    for later in range(step, step + 3):
        expected = [order.locate(position) for position in order.positions(later)]
        for world in WORLDS:
            found: list[SampleId] = []
            for rank in range(world):
                plan = MicrostepPlan(order, micro, accumulation // world, rank)
                first = later * plan.accumulation_steps
                for microstep in range(first, first + plan.accumulation_steps):
                    assert len(plan.samples(microstep)) == micro
                    found += plan.samples(microstep)
            assert found == [SampleId(sample.source, sample.number) for sample in expected]


@settings(deadline=None, max_examples=40)
@given(mixture=mixtures(), step=st.integers(1, 9), batch=st.integers(1, 12))
def test_another_batch_size_alone_leaves_the_sequence_of_samples_as_it_was(
    mixture: list[SourceRecord], step: int, batch: int
) -> None:
    order = run(mixture)
    changed = order.changed(step=step, sources=None, global_batch_size=batch)
    assert [named(changed, g) for g in range(200)] == [named(order, g) for g in range(200)]
    assert len(changed.positions(step - 1)) == 8
    assert changed.positions(step) == range(8 * step, 8 * step + batch)


@given(mixture=mixtures(), data=st.data())
def test_the_order_in_which_a_config_lists_its_sources_does_not_matter(
    mixture: list[SourceRecord], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(mixture))
    assert run(shuffled).segments == run(mixture).segments
    assert mixture_fingerprint(shuffled) == mixture_fingerprint(mixture)


@settings(deadline=None)
@given(mixture=mixtures(limited=False), position=st.integers(0, 10**15))
def test_long_run_shares_are_exact(mixture: list[SourceRecord], position: int) -> None:
    taken = run(mixture).taken(position)
    for fingerprint, share in shares(mixture).items():
        assert abs(taken[fingerprint] - position * share) < 2


def test_one_data_set_is_read_as_it_always_was() -> None:
    plain, order = SampleOrder(12, 42), run([source("a", 12)], seed=42)
    for position in range(40):
        assert order.locate(position) == Sample(0, 0, *plain.locate(position))


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    order = run([source("a", 50), source("b", 50)])
    found = defaultdict(list)
    for name, _, number in (named(order, position) for position in range(100)):
        found[name].append(number)
    assert sorted(found["a"]) == sorted(found["b"]) == list(range(50))
    assert found["a"] != found["b"]


def test_a_source_that_left_and_came_back_goes_on_where_it_stood() -> None:
    a, b = source("a", 100), source("b", 100)
    order = run([a], batch=10)
    order = order.changed(step=3, sources=[b], global_batch_size=10)
    order = order.changed(step=5, sources=[a, b], global_batch_size=10)
    samples = read(order, range(19))
    plain = [SampleOrder(100, 0).locate(n) for n in range(100)]
    assert [(epoch, number) for name, epoch, number in samples if name == "a"] == plain
    assert order.taken(190) == {"a": 100, "b": 90}
    assert [s.taken for s in order.segments[-1].sources] == [30, 20]


def test_a_run_ends_when_all_its_sources_are_exhausted() -> None:
    order = run([source("a", 10, 3, max_epochs=2), source("b", 7, 1, max_epochs=1)], batch=9)
    assert order.end == 27
    require_whole_epochs(read(order, range(3)), {"a": 10, "b": 7})
    with pytest.raises(ValueError, match="outside a mixture of 27"):
        order.locate(27)
    # A change gives it new data; what was exhausted stays so.
    longer = order.changed(
        step=3, sources=[*order.segments[0].sources, source("c", 5)], global_batch_size=9
    )
    assert {name for name, _, _ in read(longer, range(3, 9))} == {"c"}
    assert longer.end is None


def test_weights_are_the_decimal_numbers_that_were_written() -> None:
    assert shares([source("a", 1, 0.1), source("b", 1, 0.3)])["a"] * 4 == 1


def test_what_changed_in_a_data_set_is_said_in_words() -> None:
    now = replace(CONTENT, train_tokens=1_230_000, shards=1)
    assert content_differences(CONTENT, now) == (
        "train tokens was 1,234,567, is 1,230,000; shards was 2, is 1; the tokenizer is the same"
    )
    other = replace(CONTENT, tokenizer_sha256="b" * 64)
    assert content_differences(CONTENT, other) == (
        "tokenizer sha256 was aaaaaaaaaaaa, is bbbbbbbbbbbb"
    )
    assert "not the contents" in content_differences(CONTENT, CONTENT)


def test_ten_trillion_tokens_are_sought_anywhere_without_an_index() -> None:
    samples = 10**13 // 2048
    sources = [source(str(n), samples // (n + 1), 1 / (n + 1), None) for n in range(20)]
    sources.append(source("once", samples // 50, 2.0, max_epochs=1))
    order = run(sources, batch=4096).changed(
        step=10**6, sources=[*sources, source("late", samples)], global_batch_size=8192
    )
    end = 3 * samples
    positions = range(0, end, end // 2000)
    order.locate(end)
    tracemalloc.start()
    begun_at = time.thread_time()
    for position in positions:
        order.locate(position)
    seconds = time.thread_time() - begun_at
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds / len(positions) < 1e-3  # 50 µs under tracemalloc, with room for a slow machine
    assert peak_bytes < 100_000


def test_positions_and_steps_before_the_run_are_refused() -> None:
    order = run([source("a", 5)])
    with pytest.raises(ValueError, match="before the beginning"):
        order.locate(-1)
    with pytest.raises(ValueError, match="before the beginning"):
        order.positions(-1)
    with pytest.raises(ValueError, match="at least one segment"):
        RunOrder([], seed=0, shuffle=True)


def test_the_order_of_a_mixture_never_changes_between_versions() -> None:
    # A run that is resumed with a newer version must go on with the same samples.
    order = run([source("a", 9, 0.5), source("b", 5, 0.25, 1), source("c", 7, 0.25)], seed=42)
    found = [named(order, position) for position in range(12)]
    assert found == PINNED
