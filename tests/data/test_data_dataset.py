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
from mamba_dist.data import shard as shard_module
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.errors import DataError

DOCUMENTS = made_documents(900, seed=1)
_FEW = 12
_READ_WITH_NO_FILE_TO_OPEN = """
import os, resource, sys
from mamba_dist.data.dataset import open_dataset
stream = open_dataset(sys.argv[1]).train
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    stream.read(0, 5)
except Exception as error:
    print(type(error).__name__, error)
"""
_MAP_WITHOUT_ADDRESS_SPACE = """
import resource, sys
from pathlib import Path
from mamba_dist.data.shard import _map_file
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
try:
    _map_file(Path(sys.argv[1]), 0)
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


def run_python(program: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def mapped_shards(folder: Path) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith(".arrow") for line in lines)


@pytest.mark.usefixtures("few_open_files")
def test_more_shards_are_read_than_a_process_may_have_files_open(dataset: TokenDataset) -> None:
    stream = open_dataset(dataset.path).train
    ids, _ = stream.read(0, stream.tokens)
    assert ids.tolist() == expected_ids()
    assert mapped_shards(dataset.path) > 2 * _FEW


def test_a_limit_of_open_files_is_named_with_what_to_do(dataset: TokenDataset) -> None:
    said = run_python(_READ_WITH_NO_FILE_TO_OPEN, dataset.path)
    assert said.startswith("DataError shard ")
    assert "raise the limit (ulimit -n)" in said


def test_a_limit_of_address_space_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.arrow"
    path.touch()
    os.truncate(path, 2**33)
    said = run_python(_MAP_WITHOUT_ADDRESS_SPACE, path)
    assert said.startswith(f"DataError shard {path} cannot be read: ")
    assert "ulimit -v" in said
    assert "vm.max_map_count" in said


def test_only_the_shards_read_last_stay_mapped(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "_KEPT_READERS", 3)
    stream = open_dataset(dataset.path).train
    before, expected = mapped_shards(dataset.path), expected_ids()
    first = stream._place(0).tokens
    for _ in range(2):
        for start in range(0, len(expected) - 30, 200):
            assert stream.read(start, start + 30)[0].tolist() == expected[start : start + 30]
            # The one of the view above too, which outlives its reader.
            assert mapped_shards(dataset.path) - before <= 4
    assert first.tolist() == expected[: len(first)]
    shard, _ = stream._batches[0]
    batches = stream._table.batches
    for batch in (batches // 4, batches // 3, 0, batches // 2):
        stream._batches[batch]
    assert stream._batches[0][0] is shard


def test_shards_are_let_go_also_after_threads_stepped_over_the_limit(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_dataset(dataset.path).train
    before = mapped_shards(dataset.path)
    expected = expected_ids()
    for start in range(0, len(expected) // 2, 30):
        stream.read(start, start + 30)
    # As two threads leave it that each found room for one more.
    monkeypatch.setattr(shard_module, "_KEPT_READERS", len(stream._batches._readers) - 1)
    monkeypatch.setattr(dataset_module, "_KEPT_PLACES", len(stream._places) - 1)
    stream.read(len(expected) - 30, len(expected))
    assert mapped_shards(dataset.path) - before <= shard_module._KEPT_READERS
    assert len(stream._places) <= dataset_module._KEPT_PLACES


@pytest.mark.parametrize("file", ["index.npy", "train-00000.arrow"])
def test_the_kernel_is_told_that_reading_jumps_about(dataset: TokenDataset, file: str) -> None:
    opened = open_dataset(dataset.path)
    opened.train.read(0, 5)
    smaps = Path("/proc/self/smaps").read_text()
    if "VmFlags:" not in smaps:
        pytest.skip("this kernel does not tell the advice it was given")
    of_file = smaps.split(str(dataset.path / file))[1:]
    flags = [entry.split("VmFlags:")[1].splitlines()[0].split() for entry in of_file]
    assert flags
    assert all("rr" in some for some in flags)


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
