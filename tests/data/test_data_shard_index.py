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
from mamba_dist.data.manifest import Manifest, read_manifest, write_manifest
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.shard_index import (
    INDEX_NAME,
    ShardIndex,
    SplitTable,
    index_bytes,
    index_of,
    with_checks,
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
    assert index_bytes(again) == (dataset.path / INDEX_NAME).read_bytes()
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


def test_a_missing_or_shortened_index_is_one_clear_error(copied: Path) -> None:
    path = copied / INDEX_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        open_dataset(copied)
    path.unlink()
    with pytest.raises(DataError, match=r"index\.npy cannot be read.*restore it"):
        open_dataset(copied)


def test_an_index_of_another_data_set_is_refused(copied: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", made_documents(70, seed=3), [[1, 0]])
    (copied / INDEX_NAME).write_bytes((other.path / INDEX_NAME).read_bytes())
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        open_dataset(copied)


BATCHES, PER_SHARD, TOKENS = 1_200_000, 32, 8_400_000


@pytest.fixture(scope="module")
def ten_trillion(dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 10 trillion training tokens in 37,500 shards, none of which exists."""
    numbers = np.arange(BATCHES + 1, dtype=np.uint64)
    batches = np.stack([numbers * TOKENS, numbers * 9000, *[numbers] * 4]).astype("<u8")
    shard_numbers = np.arange(BATCHES // PER_SHARD + 1, dtype=np.uint64)
    shards = np.stack([shard_numbers * PER_SHARD, *[shard_numbers] * 7]).astype("<u8")
    train = SplitTable("train", with_checks(shards, (0,)), with_checks(batches, (0, 1)))
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
    begun_at = time.perf_counter()
    manifest = read_manifest(ten_trillion)
    fingerprint, stream = manifest.fingerprint, TokenStream(ten_trillion, manifest, "train")
    opened_s = time.perf_counter() - begun_at
    table = manifest.shards_of("train")
    order = SampleOrder(stream.tokens // length, 7)
    positions = range(0, 10**12, 10**9)
    begun_at = time.perf_counter()
    for position in positions:
        window = order.locate(position)[1]
        batch = table.batch_at(window * length)
        assert batch == window * length // TOKENS
        shard, place = table.find_batch(batch)
        assert (shard, place) == divmod(batch, PER_SHARD)
        assert table.batch(batch, hashed=True).tokens == TOKENS
    sought_s = (time.perf_counter() - begun_at) / len(positions)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened_s < 0.5  # 1 ms, with room for a slow machine
    assert sought_s < 2e-3
    assert peak_bytes < 200_000
    assert manifest.computed_fingerprint() == fingerprint
