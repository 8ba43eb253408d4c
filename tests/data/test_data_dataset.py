"""Reading a split as one stream: many shards, few descriptors, damage that is named."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_data import made_documents, write_dataset

from mamba_dist.data import dataset as dataset_module
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.errors import DataError

DOCUMENTS = made_documents(900, seed=1)
_FEW = 12
_READ_WITH_A_HARD_LIMIT = f"""
import os, resource, sys
from mamba_dist.data.dataset import open_dataset
stream = open_dataset(sys.argv[1]).train
limit = len(os.listdir("/proc/self/fd")) + {_FEW}
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    stream.read(0, stream.tokens)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    made = write_dataset(tmp_path_factory.mktemp("many"), DOCUMENTS, made_documents(9, seed=2))
    assert len(made.manifest.shards_of("train")) > 3 * _FEW
    return made


@pytest.fixture
def few_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + _FEW, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def expected_ids() -> list[int]:
    return [token for document in DOCUMENTS for token in document]


@pytest.mark.usefixtures("few_open_files")
def test_more_shards_are_read_than_a_process_may_have_files_open_at_first(
    dataset: TokenDataset,
) -> None:
    stream = open_dataset(dataset.path).train
    ids, _ = stream.read(0, stream.tokens)
    assert ids.tolist() == expected_ids()


def test_a_limit_of_open_files_that_cannot_be_raised_is_named(dataset: TokenDataset) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _READ_WITH_A_HARD_LIMIT, str(dataset.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("DataError shard ")
    assert "raise that limit (ulimit -Hn)" in done.stdout


def test_a_data_set_of_more_batches_than_are_kept_in_mind_reads_the_same(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "_KEPT_PLACES", 2)
    stream = open_dataset(dataset.path).train
    expected = expected_ids()
    for start in range(0, len(expected) - 30, 30):
        assert stream.read(start, start + 30)[0].tolist() == expected[start : start + 30]
    assert len(stream._places) <= 2


def test_nothing_is_read_at_the_very_end(dataset: TokenDataset) -> None:
    ids, begins = dataset.train.read(dataset.train.tokens, dataset.train.tokens)
    assert ids.size == begins.size == 0


@pytest.mark.parametrize("first", [0, 7])
def test_a_document_index_of_zeros_is_named(tmp_path: Path, first: int) -> None:
    made = write_dataset(tmp_path / "set", DOCUMENTS[:40], made_documents(9, seed=2))
    record = made.manifest.shards_of("train")[0]
    batch = record.batches[0]
    with (made.path / record.file).open("r+b") as stream:
        stream.seek(batch.offsets_at)
        stream.write(bytes(8 * (batch.documents + 1)))
    with pytest.raises(DataError, match=rf"{record.file} has a damaged document index"):
        open_dataset(made.path).train.read(first, first + 10)
