from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import VOCAB_SIZE, as_documents, folder_bytes, made_documents, write_dataset

from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.manifest import write_manifest
from mamba_dist.data.shard import ShardReader, schema_metadata, token_dtype
from mamba_dist.data.shard_writer import ShardWriter
from mamba_dist.errors import DataError

DOCUMENTS = made_documents(60, seed=1)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(tmp_path / "set", DOCUMENTS, made_documents(9, seed=2))


def first_shard(dataset: TokenDataset) -> Path:
    return dataset.path / dataset.manifest.shards[0].file


def reader(dataset: TokenDataset) -> ShardReader:
    record = dataset.manifest.shards[0]
    return ShardReader(dataset.path / record.file, record, dataset.manifest)


def test_plain_pyarrow_reads_the_documents_in_order(dataset: TokenDataset) -> None:
    found, ids = [], []
    for record in dataset.manifest.shards_of("train"):
        with pa.ipc.open_file(str(dataset.path / record.file)) as shard:
            table = shard.read_all()
        assert table.schema.field("tokens").type.value_type == pa.uint16()
        found += table.column("tokens").to_pylist()
        ids += table.column("doc_id").to_pylist()
    assert found == DOCUMENTS
    assert ids == list(range(len(DOCUMENTS)))
    assert len(dataset.manifest.shards_of("train")) > 2


def test_a_shard_says_what_it_is(dataset: TokenDataset) -> None:
    with pa.ipc.open_file(str(first_shard(dataset))) as shard:
        metadata = shard.schema.metadata
    assert metadata[b"mamba_dist.format_version"] == b"1"
    assert metadata[b"mamba_dist.vocab_size"] == str(VOCAB_SIZE).encode()
    assert metadata[b"mamba_dist.eos_id"] == b"0"
    assert metadata[b"mamba_dist.tokenizer_sha256"] == b"0" * 64


def test_reading_is_a_view_into_the_mapped_file(dataset: TokenDataset) -> None:
    shard = reader(dataset)
    mapped = np.frombuffer(shard._map, dtype=np.uint8)
    for view in (shard.tokens(0), shard.offsets(0), shard.doc_ids(0), shard.tokens(1)):
        assert np.shares_memory(view, mapped)
        assert not view.flags.writeable


def test_opening_a_data_set_maps_nothing(dataset: TokenDataset) -> None:
    opened = open_dataset(dataset.path)
    stream = opened.train
    assert not stream._batches._readers
    stream.read(0, 5)
    assert ["_map" in vars(shard) for shard, _ in stream._batches._readers.values()] == [True]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_range_of_the_stream_is_read_right(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    dataset = write_dataset(tmp_path_factory.mktemp("range"), DOCUMENTS, [[1, 0]])
    stream = [token for document in DOCUMENTS for token in document]
    begins = [i == 0 for document in DOCUMENTS for i in range(len(document))]
    for _ in range(10):
        start = data.draw(st.integers(0, len(stream) - 1))
        stop = data.draw(st.integers(start, len(stream)))
        ids, marks = dataset.train.read(start, stop)
        assert ids.tolist() == stream[start:stop]
        assert marks.tolist() == begins[start:stop]


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 25), min_size=1, max_size=8))
def test_shards_do_not_depend_on_how_the_documents_arrive(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int]
) -> None:
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    write_shards(whole, [60])
    write_shards(cut, [*pieces, 60])
    assert folder_bytes(whole) == folder_bytes(cut)


def write_shards(folder: Path, pieces: list[int]) -> None:
    metadata = schema_metadata(
        "train", dtype="uint16", tokenizer_sha256="0", vocab_size=VOCAB_SIZE, eos_id=0
    )
    writer = ShardWriter(folder, "train", metadata=metadata, shard_bytes=900, batch_tokens=70)
    rest = as_documents(DOCUMENTS)
    for count in pieces:
        head, rest = rest.cut(count)
        writer.add(head)
    writer.finish()


def test_shards_and_batches_keep_to_their_limits(dataset: TokenDataset) -> None:
    for shard in dataset.manifest.shards_of("train"):
        assert shard.tokens * 2 <= 600
        assert all(batch.tokens <= 100 for batch in shard.batches)


def test_a_document_longer_than_a_batch_is_kept_whole(tmp_path: Path) -> None:
    long = [5] * 1000 + [0]
    dataset = write_dataset(tmp_path, [[1, 0], long, [2, 0]], [[1, 0]])
    assert dataset.train.read(0, 1005)[0].tolist() == [1, 0, *long, 2, 0]


def test_small_vocabularies_are_stored_in_two_bytes() -> None:
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32


def test_an_id_beyond_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="id 1000 is outside the vocabulary of 1000"):
        write_dataset(tmp_path, [[1000, 0]], [[1, 0]])
    assert not (tmp_path / "manifest.json").exists()


def test_a_truncated_shard_is_named_at_open(dataset: TokenDataset) -> None:
    path = first_shard(dataset)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        open_dataset(dataset.path)
    message = str(caught.value)
    assert f"shard {path} is truncated" in message
    assert f"{size - 100} bytes" in message
    assert f"says {size}" in message


def test_a_grown_shard_is_named_at_open(dataset: TokenDataset) -> None:
    path = first_shard(dataset)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="is longer than it was"):
        open_dataset(dataset.path)


def test_a_missing_shard_is_named_at_open(dataset: TokenDataset) -> None:
    first_shard(dataset).unlink()
    with pytest.raises(DataError, match=r"train-00000.arrow of the manifest is missing"):
        open_dataset(dataset.path)


def test_a_file_of_the_right_size_that_is_no_shard_is_refused(dataset: TokenDataset) -> None:
    path = first_shard(dataset)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="is no Arrow file"):
        open_dataset(dataset.path).train.read(0, 1)


def test_a_damaged_footer_is_refused(dataset: TokenDataset) -> None:
    path = first_shard(dataset)
    content = bytearray(path.read_bytes())
    content[-200:-10] = bytes(190)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000.arrow"):
        open_dataset(dataset.path).train.read(0, 1)


def test_a_shard_of_another_data_set_is_refused(dataset: TokenDataset) -> None:
    tokenizer = replace(dataset.manifest.tokenizer, sha256="1" * 64)
    write_manifest(dataset.path, replace(dataset.manifest, tokenizer=tokenizer))
    with pytest.raises(DataError, match="belongs to another data set: its tokenizer_sha256"):
        open_dataset(dataset.path).train.read(0, 1)
