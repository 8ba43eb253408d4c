"""index.npy: read back, damaged anywhere, and so large that reading it whole would be felt."""

import re
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import made_documents, write_dataset
from old_manifest import write_version_1

from mamba_dist.data import dataset as dataset_module
from mamba_dist.data.dataset import TokenDataset, TokenStream, open_dataset
from mamba_dist.data.index_file import index_bytes
from mamba_dist.data.manifest import Manifest, read_manifest, write_manifest
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.shard_index import (
    INDEX_NAME,
    SPLITS,
    Numbers,
    ShardIndex,
    index_of,
    new_table,
)
from mamba_dist.errors import DataError

DOCUMENTS = made_documents(60, seed=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return write_dataset(tmp_path_factory.mktemp("set"), DOCUMENTS, made_documents(9, seed=2))


@pytest.fixture
def copied(dataset: TokenDataset, tmp_path: Path) -> Path:
    for path in dataset.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shards_and_batches_are_read_back_as_they_were_written(dataset: TokenDataset) -> None:
    shards = list(dataset.manifest.shards)
    plain = [replace(shard, batches=tuple(shard.batches)) for shard in shards]
    again = index_of(plain)
    assert again == plain == shards
    assert len(plain) == len(again) > 3
    assert again[-1] == plain[-1]
    assert again[1:3] == tuple(plain[1:3])
    in_file = (dataset.path / INDEX_NAME).read_bytes()
    assert index_bytes(again, dataset.fingerprint) == in_file
    assert index_bytes(dataset.manifest.index, dataset.fingerprint) == in_file
    for split in ("train", "val"):
        of_split = [shard for shard in plain if shard.split == split]
        table = again.split(split)
        assert table == of_split
        assert table.tokens == sum(shard.tokens for shard in of_split)
        assert table.documents == sum(shard.documents for shard in of_split)
        batches = [batch for shard in of_split for batch in shard.batches]
        assert table.batches == len(batches)
        begin = 0
        for number, batch in enumerate(batches):
            assert table.token_begins[number] == begin
            assert table.batch_at(begin) == table.batch_at(begin + batch.tokens - 1) == number
            shard, place = table.find_batch(number)
            assert of_split[shard].batches[place] == batch
            begin += batch.tokens
    with pytest.raises(IndexError):
        again[len(plain)]


def test_numpy_reads_the_index_without_us(dataset: TokenDataset) -> None:
    numbers = np.load(dataset.path / INDEX_NAME)
    assert numbers.dtype == np.dtype("<u8")
    table = dataset.manifest.shards_of("train")
    assert numbers[: len(table) + 1].tolist()[-1] == table.batches


def test_a_data_set_of_version_1_is_the_same_data_set(copied: Path, dataset: TokenDataset) -> None:
    write_version_1(copied, dataset.manifest)
    old = open_dataset(copied)
    assert old.manifest == dataset.manifest
    assert old.fingerprint == dataset.fingerprint
    stream = old.train
    assert stream.read(0, stream.tokens)[0].tolist() == [t for doc in DOCUMENTS for t in doc]


def test_what_no_index_can_hold_is_refused(dataset: TokenDataset) -> None:
    first, *others = dataset.manifest.shards
    for wrong in (
        [replace(first, file="other.arrow"), *others],
        [replace(first, tokens=first.tokens + 1), *others],
        [replace(first, documents=first.documents + 1), *others],
        [*others, first],
    ):
        with pytest.raises(ValueError, match=r"expected|add up"):
            index_of(wrong)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_byte_changed_anywhere_never_gives_other_tokens(
    copied: Path, dataset: TokenDataset, data: st.DataObject
) -> None:
    path = copied / INDEX_NAME
    whole = (dataset.path / INDEX_NAME).read_bytes()
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    expected = [token for document in DOCUMENTS for token in document]
    try:
        for start in range(0, len(expected), 37):
            stop = min(start + 37, len(expected))
            # A process each time, as it were: what one found whole helps no other.
            found, begins = open_dataset(copied).train.read(start, stop)
            assert found.tolist() == expected[start:stop]
            assert begins.tolist() == dataset.train.read(start, stop)[1].tolist()
    except DataError as error:
        assert re.search(rf"{path}|manifest\.json is damaged", str(error))  # noqa: PT017


@pytest.mark.parametrize("wrong", [0, 2**60])
def test_a_search_led_astray_by_a_damaged_row_is_noticed(
    copied: Path, dataset: TokenDataset, wrong: int
) -> None:
    path = copied / INDEX_NAME
    whole = path.read_bytes()
    table = dataset.manifest.shards_of("train")
    first_tokens_at = 128 + 8 * 9 * (len(table) + 1)
    noticed = []
    for number in range(1, table.batches):
        content = bytearray(whole)
        at = first_tokens_at + 8 * number
        content[at : at + 8] = wrong.to_bytes(8, "little")
        path.write_bytes(content)
        stream = open_dataset(copied).train
        for start in range(0, stream.tokens - 5, 50):
            try:
                found = stream.read(start, start + 5)[0].tolist()
            except DataError as error:
                noticed.append(str(error))
            else:
                assert found == dataset.train.read(start, start + 5)[0].tolist()
    assert len(noticed) >= table.batches
    assert all("index.npy is damaged in the split train" in said for said in noticed)


@pytest.mark.parametrize(("at", "wrong"), [(0, 2**60), (-1, 0)])
def test_a_search_that_ends_outside_the_shards_is_noticed(
    copied: Path, dataset: TokenDataset, at: int, wrong: int
) -> None:
    numbers, found = tables(copied, dataset.manifest)
    shards, _ = found["train"]
    if at == 0:
        shards[0] = wrong
    else:
        shards[0, at] = wrong
    np.save(copied / INDEX_NAME, numbers)
    table = read_manifest(copied).shards_of("train")
    with pytest.raises(DataError, match=r"split train where [\d,]+ was searched among"):
        table.find_batch(0 if at == 0 else table.batches - 1)


def test_a_missing_or_shortened_index_is_one_clear_error(copied: Path) -> None:
    path = copied / INDEX_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        open_dataset(copied)
    path.unlink()
    with pytest.raises(DataError, match=r"index\.npy cannot be read.*restore it"):
        open_dataset(copied)


def test_an_index_of_a_larger_data_set_is_refused(copied: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", made_documents(70, seed=3), [[1, 0]])
    (copied / INDEX_NAME).write_bytes((other.path / INDEX_NAME).read_bytes())
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        open_dataset(copied)


def test_an_index_of_another_data_set_of_equal_counts_is_refused_at_every_read(
    tmp_path: Path,
) -> None:
    lengths = [20 + 7 * number % 31 for number in range(60)]
    ours, theirs = (
        write_dataset(
            tmp_path / name,
            [[1 + first] * (length - 1) + [0] for length in some],
            made_documents(9, seed=2),
            batch_tokens=300,
        )
        for first, (name, some) in enumerate([("ours", lengths), ("theirs", lengths[::-1])])
    )
    counts = [
        [
            (t.tokens, t.documents, t.batches, len(t))
            for t in (m.shards_of("train"), m.shards_of("val"))
        ]
        for m in (ours.manifest, theirs.manifest)
    ]
    assert counts[0] == counts[1]
    (ours.path / INDEX_NAME).write_bytes((theirs.path / INDEX_NAME).read_bytes())
    for start in range(0, ours.train.tokens - 16, 16):
        with pytest.raises(
            DataError, match=r"index\.npy is damaged .* of another data set; restore"
        ):
            open_dataset(ours.path).train.read(start, start + 16)


def tables(folder: Path, manifest: Manifest) -> tuple[Numbers, dict[str, list[Numbers]]]:
    """The numbers of an index, and views of them: the shards and the batches of each split."""
    numbers, at = np.load(folder / INDEX_NAME), 0
    found: dict[str, list[Numbers]] = {}
    for split in SPLITS:
        table = manifest.shards_of(split)
        for columns, rows in ((9, len(table)), (7, table.batches)):
            size = columns * (rows + 1)
            found.setdefault(split, []).append(numbers[at : at + size].reshape(columns, -1))
            at += size
    return numbers, found


def test_rows_in_the_place_of_others_are_refused(copied: Path, dataset: TokenDataset) -> None:
    numbers, found = tables(copied, dataset.manifest)
    for rows in found["train"]:
        # In pairs, so that what comes after a row comes with it.
        rows[:, [0, 1, 2, 3]] = rows[:, [2, 3, 0, 1]]
    np.save(copied / INDEX_NAME, numbers)
    table = read_manifest(copied).shards_of("train")
    for number in (0, 2):
        with pytest.raises(DataError, match=rf"in the row of batch {number}, or"):
            table.batch(number, hashed=True)
        with pytest.raises(DataError, match=rf"in the row of shard {number}, or"):
            table[number]


def test_a_row_of_the_other_split_is_refused(copied: Path, dataset: TokenDataset) -> None:
    numbers, found = tables(copied, dataset.manifest)
    for ours, theirs in zip(found["train"], found["val"], strict=True):
        ours[:, :2] = theirs[:, :2]
    np.save(copied / INDEX_NAME, numbers)
    table = read_manifest(copied).shards_of("train")
    with pytest.raises(DataError, match=r"in the row of batch 0, or"):
        table.batch(0, hashed=True)
    with pytest.raises(DataError, match=r"in the row of shard 0, or"):
        table[0]


def test_a_damaged_index_is_not_sealed_for_another_data_set(
    copied: Path, dataset: TokenDataset
) -> None:
    numbers, found = tables(copied, dataset.manifest)
    found["train"][1][3, 2] += 8
    np.save(copied / INDEX_NAME, numbers)
    manifest = read_manifest(copied)
    tokenizer = replace(manifest.tokenizer, sha256="1" * 64)
    with pytest.raises(DataError, match=r"in the row of batch 2, or"):
        write_manifest(copied, replace(manifest, tokenizer=tokenizer))


BATCHES, PER_SHARD, TOKENS = 1_200_000, 32, 8_400_000


@pytest.fixture(scope="module")
def ten_trillion(dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 10 trillion training tokens in 37,500 shards, none of which exists."""
    numbers = np.arange(BATCHES + 1, dtype=np.uint64)
    batches = np.stack([numbers * TOKENS, numbers * 9000, *[numbers] * 4]).astype("<u8")
    shard_numbers = np.arange(BATCHES // PER_SHARD + 1, dtype=np.uint64)
    shards = np.stack([shard_numbers * PER_SHARD, *[shard_numbers] * 7]).astype("<u8")
    train = new_table("train", shards, batches)
    val = dataset.manifest.shards_of("val")
    folder = tmp_path_factory.mktemp("ten_trillion")
    manifest: Manifest = replace(dataset.manifest, shards=ShardIndex([train, val]))
    assert manifest.tokens("train") > 10**13
    write_manifest(folder, manifest)
    assert (folder / INDEX_NAME).stat().st_size > 60_000_000
    return folder


def test_of_very_many_shards_some_are_looked_for_when_a_data_set_is_opened(
    ten_trillion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"train-00000\.arrow of the manifest is missing"):
        open_dataset(ten_trillion)
    looked_for = []
    monkeypatch.setattr(
        dataset_module, "check_size", lambda path, record: looked_for.append((path, record))
    )
    open_dataset(ten_trillion)
    names = [path.name for path, _ in looked_for if path.name.startswith("train")]
    assert 90 <= len(set(names)) <= 100
    assert names[-1] >= "train-37000.arrow"
    assert all(path.name == record.file for path, record in looked_for)


def test_ten_trillion_tokens_are_opened_and_sought_by_a_few_pages(ten_trillion: Path) -> None:
    length = 2048
    assert (ten_trillion / "manifest.json").stat().st_size < 5_000
    tracemalloc.start()
    begun_at = time.thread_time()
    manifest = read_manifest(ten_trillion)
    fingerprint, stream = manifest.fingerprint, TokenStream(ten_trillion, manifest, "train")
    opened_s = time.thread_time() - begun_at
    table = manifest.shards_of("train")
    order = SampleOrder(stream.tokens // length, 7)
    positions = range(0, 10**12, 10**9)
    begun_at = time.thread_time()
    for position in positions:
        window = order.locate(position)[1]
        batch = table.batch_at(window * length)
        assert batch == window * length // TOKENS
        shard, place = table.find_batch(batch)
        assert (shard, place) == divmod(batch, PER_SHARD)
        assert table.batch(batch, hashed=True).tokens == TOKENS
    sought_s = (time.thread_time() - begun_at) / len(positions)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened_s < 0.5  # 1 ms, with room for a slow machine
    assert sought_s < 2e-3
    assert peak_bytes < 200_000
    assert manifest.computed_fingerprint() == fingerprint
