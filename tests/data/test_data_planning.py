import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import EOS, made_documents, write_dataset

from mamba_dist.config.schema import Packing
from mamba_dist.data import planning
from mamba_dist.data.batch import IGNORED_LABEL, PackedRows, SampleId, pack
from mamba_dist.data.dataset import TokenDataset
from mamba_dist.data.packing_plan import PLAN_FORMAT_VERSION, plan_key, plan_path
from mamba_dist.data.planning import cut_documents, make_plan, packing_totals, regroup
from mamba_dist.data.samples import training_samples
from mamba_dist.errors import DataError

PAD = 7
PINNED = "94b6e0a5c99637b0"
PLANNED: tuple[Packing, ...] = ("best_fit", "pad")
MODES: tuple[Packing, ...] = ("concat", "best_fit", "pad")


def plan(dataset: TokenDataset, packing: Packing, length: int) -> Path:
    make_plan(
        dataset.path, dataset.manifest, packing=packing, length=length, advance=lambda tokens: None
    )
    return plan_path(dataset.path, plan_key(dataset.fingerprint, packing, length))


def epoch(dataset: TokenDataset, packing: Packing, length: int) -> PackedRows:
    """All samples, in their order."""
    samples = training_samples(dataset, packing=packing, length=length)
    return pack(
        [samples], [SampleId(0, number) for number in range(len(samples))], pad_token_id=PAD
    )


def pieces_of(document: list[int], length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, labels) of each piece of a document, prediction by prediction."""
    predictions = list(pairwise(document))
    cut = [predictions[at : at + length] for at in range(0, len(predictions), length)]
    return [(tuple(a for a, _ in piece), tuple(b for _, b in piece)) for piece in cut]


def pieces_in(rows: PackedRows, row: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, labels) of each run of equal seq_idx in a row but the padding, which is looked at
    here."""
    owners = rows.seq_idx[row].tolist()
    used = int((rows.labels[row] != IGNORED_LABEL).sum())
    assert (rows.labels[row, used:] == IGNORED_LABEL).all()
    assert (rows.input_ids[row, used:] == PAD).all()
    count = owners[used - 1] + 1
    assert owners[used:] == [count] * (len(owners) - used)
    assert owners[:used] == sorted(owners[:used])
    assert set(owners[:used]) == set(range(count))
    return [
        (
            tuple(rows.input_ids[row, :used][rows.seq_idx[row, :used] == number].tolist()),
            tuple(rows.labels[row, :used][rows.seq_idx[row, :used] == number].tolist()),
        )
        for number in range(count)
    ]


def fewest_bins_one_by_one(sizes: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - size)
    return len(rooms)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=40).filter(any),
    length=st.integers(1, 50),
    batch_tokens=st.sampled_from([10, 33, 1000]),
    packing=st.sampled_from(PLANNED),
)
def test_the_rows_of_an_epoch_hold_every_piece_of_every_document_once(
    lengths: list[int], length: int, batch_tokens: int, packing: Packing
) -> None:
    rng = np.random.default_rng(sum(lengths))
    documents = [[*rng.integers(1, 999, n).tolist(), EOS] for n in lengths]
    expected = [piece for document in documents for piece in pieces_of(document, length)]
    with TemporaryDirectory() as folder:
        dataset = write_dataset(
            Path(folder), documents, [[1, EOS]], shard_bytes=80, batch_tokens=batch_tokens
        )
        plan(dataset, packing, length)
        rows = epoch(dataset, packing, length)
    found = [pieces_in(rows, row) for row in range(len(rows.sample_ids))]
    assert Counter(piece for row in found for piece in row) == Counter(expected)
    sizes = [len(inputs) for inputs, _ in expected]
    if packing == "pad":
        assert [len(row) for row in found] == [1] * len(expected)
    else:
        assert len(found) == fewest_bins_one_by_one(sizes, length)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    """Documents of 1 to 59 tokens and their EOS, over several shards."""
    documents = [*made_documents(150, seed=1, longest=59), [EOS]]
    return write_dataset(tmp_path / "set", documents, made_documents(10, seed=2))


@pytest.mark.parametrize("packing", PLANNED)
@pytest.mark.parametrize("group_pieces", [1, 7, 50, 10**6])
def test_every_label_comes_once_an_epoch_whatever_the_group(
    dataset: TokenDataset, packing: Packing, group_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "GROUP_PIECES", group_pieces)
    plan(dataset, packing, 24)
    samples = training_samples(dataset, packing=packing, length=24)
    predicted = Counter(
        place
        for sample in range(len(samples))
        for span in samples.spans(sample)
        for place in range(span.start + 1, span.start + span.length + 1)
    )
    _, begins = dataset.train.read(0, dataset.train.tokens)
    assert predicted == Counter(np.flatnonzero(~begins).tolist())


def test_concat_differs_by_the_end_of_the_stream_alone(dataset: TokenDataset) -> None:
    rows = epoch(dataset, "concat", 24)
    windows = len(rows.sample_ids)
    ids, begins = dataset.train.read(0, dataset.train.tokens)
    predicted = ids[1 : 24 * windows + 1][~begins[1 : 24 * windows + 1]]
    assert rows.labels[rows.labels != IGNORED_LABEL].tolist() == predicted.tolist()
    assert 0 <= dataset.train.tokens - 1 - 24 * windows < 24


@pytest.mark.parametrize("packing", PLANNED)
def test_a_plan_is_the_same_bytes_each_time_and_knows_what_it_holds(
    dataset: TokenDataset, packing: Packing
) -> None:
    path = plan(dataset, packing, 24)
    first = path.read_bytes()
    path.unlink()
    assert plan(dataset, packing, 24).read_bytes() == first
    assert [p.name for p in dataset.path.glob(".*")] == []


@pytest.mark.parametrize("packing", MODES)
@pytest.mark.parametrize("length", [1, 24, 10_000])
def test_the_totals_are_those_of_the_rows(
    dataset: TokenDataset, packing: Packing, length: int
) -> None:
    totals = packing_totals(
        dataset.path, dataset.manifest, packing=packing, length=length, advance=lambda tokens: None
    )
    if packing != "concat":
        plan(dataset, packing, length)
    rows = epoch(dataset, packing, length)
    labels = int((rows.labels != IGNORED_LABEL).sum())
    assert (totals.samples, totals.labels) == (len(rows.sample_ids), labels)
    assert totals.unlabelled_share(length) == pytest.approx((rows.labels == IGNORED_LABEL).mean())
    assert totals.documents == 151
    _, begins = dataset.train.read(0, dataset.train.tokens)
    edges = [*np.flatnonzero(begins).tolist(), dataset.train.tokens]
    documents = [range(a, b - 1) for a, b in pairwise(edges)]
    if packing == "concat":
        cut = [d for d in documents if d and d[0] // length != d[-1] // length]
    else:
        cut = [d for d in documents if len(d) > length]
    assert totals.cut_documents == len(cut)
    assert bool(cut) == (length < 10_000)


def test_a_plan_is_what_it_was_when_runs_began_with_it(dataset: TokenDataset) -> None:
    # Another answer would change the samples of runs that go on: it needs another plan version.
    plan(dataset, "best_fit", 64)
    samples = training_samples(dataset, packing="best_fit", length=64)
    spans = [[(s.start, s.length) for s in samples.spans(n)] for n in range(len(samples))]
    digest = hashlib.sha256(repr(spans).encode()).hexdigest()
    assert (PLAN_FORMAT_VERSION, digest[:16]) == (1, PINNED)


def test_best_fit_pads_less_than_pad_and_cuts_less_than_concat(dataset: TokenDataset) -> None:
    concat, best_fit, pad = (
        packing_totals(
            dataset.path, dataset.manifest, packing=mode, length=64, advance=lambda tokens: None
        )
        for mode in MODES
    )
    assert best_fit.cut_documents == pad.cut_documents == 0 < concat.cut_documents
    assert best_fit.unlabelled_share(64) < 0.05 < 0.3 < pad.unlabelled_share(64)


def test_samples_stand_in_the_order_of_their_first_documents(dataset: TokenDataset) -> None:
    plan(dataset, "best_fit", 64)
    samples = training_samples(dataset, packing="best_fit", length=64)
    starts = [[s.start for s in samples.spans(number)] for number in range(len(samples))]
    assert starts == sorted(starts)
    assert all(places == sorted(places) for places in starts)


def test_groups_have_the_size_asked_for_and_lose_nothing() -> None:
    batches = [
        cut_documents(np.arange(n) * 100 + 10_000 * i, np.full(n, 31), length=7)
        for i, n in enumerate([3, 0, 1, 9, 2])
    ]
    groups = list(regroup(batches, 10))
    assert [len(group.starts) for group in groups] == [10] * 7 + [5]
    for field in ("starts", "lengths"):
        joined = np.concatenate([getattr(group, field) for group in groups])
        assert joined.tolist() == np.concatenate([getattr(b, field) for b in batches]).tolist()


def test_offsets_that_do_not_rise_are_one_clear_error(dataset: TokenDataset) -> None:
    record = dataset.manifest.shards[0]
    path = dataset.path / record.file
    content = bytearray(path.read_bytes())
    content[record.batches[0].offsets_at + 8 : record.batches[0].offsets_at + 16] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"shard {path} is damaged: the offsets of its batch 0"):
        plan(dataset, "pad", 24)
    assert not list(dataset.path.glob("*.plan")) + list(dataset.path.glob(".*"))
