"""Shards are Arrow files that others read too; each package that is absent is skipped by name."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.shard_index import ShardRecord


@pytest.fixture
def shard(finished: Path) -> ShardRecord:
    record = open_dataset(finished).manifest.shards_of("train")[0]
    assert len(record.batches) > 1
    return record


def expected(folder: Path, shard: ShardRecord) -> tuple[list[list[int]], list[int]]:
    """The documents of the first training shard, by our own reader, and their numbers."""
    dataset = open_dataset(folder)
    ids, begins = dataset.train.read(0, shard.tokens)
    starts = [*begins.nonzero()[0].tolist(), shard.tokens]
    documents = [ids[a:b].tolist() for a, b in pairwise(starts)]
    with pa.ipc.open_file(str(folder / shard.file)) as reader:
        return documents, reader.read_all().column("doc_id").to_pylist()


def test_plain_pyarrow_maps_a_shard_without_copying(finished: Path, shard: ShardRecord) -> None:
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(finished / shard.file)) as source:
        table = pa.ipc.open_file(source).read_all()
        assert pa.total_allocated_bytes() - before < shard.bytes / 10
        assert table.column("tokens").to_pylist() == expected(finished, shard)[0]


def test_hugging_face_datasets_opens_a_shard(
    finished: Path, shard: ShardRecord, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    documents, doc_ids = expected(finished, shard)
    path = str(finished / shard.file)
    # Not Dataset.from_file: that reads Arrow's stream format, and shards are of its file format.
    mapped = datasets.Dataset(pa.ipc.open_file(pa.memory_map(path)).read_all())
    copied = datasets.load_dataset("arrow", data_files=path, split="train", cache_dir=tmp_path)
    for dataset in (mapped, copied):
        assert dataset["tokens"][:] == documents
        assert dataset["doc_id"][:] == doc_ids
        assert dataset[len(dataset) - 1]["tokens"] == documents[-1]


def test_polars_reads_and_scans_a_shard(finished: Path, shard: ShardRecord) -> None:
    polars = pytest.importorskip("polars", reason="the package polars is not installed")
    documents, doc_ids = expected(finished, shard)
    path = finished / shard.file
    for frame in (polars.read_ipc(path), polars.scan_ipc(path).collect()):
        assert frame["tokens"].to_list() == documents
        assert frame["doc_id"].to_list() == doc_ids
    longest = polars.scan_ipc(path).select(polars.col("tokens").list.len().max()).collect().item()
    assert longest == max(map(len, documents))


def test_duckdb_queries_a_shard_through_pyarrow(finished: Path, shard: ShardRecord) -> None:
    duckdb = pytest.importorskip("duckdb", reason="the package duckdb is not installed")
    documents, doc_ids = expected(finished, shard)
    with duckdb.connect() as connection:
        table = pa.ipc.open_file(pa.memory_map(str(finished / shard.file))).read_all()
        connection.register("shard", table)
        rows = connection.execute("select doc_id, tokens, len(tokens) from shard").fetchall()
    assert rows == [
        (doc_id, tokens, len(tokens)) for doc_id, tokens in zip(doc_ids, documents, strict=True)
    ]
