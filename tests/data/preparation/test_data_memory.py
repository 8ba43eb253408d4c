"""How much memory reading takes, measured in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

READER = """
import sys
from pathlib import Path
from mamba_dist.data.preparation.documents import BadDocument, Reading, SliceReader
from mamba_dist.data.preparation.sources import DiscoveryOptions, discover, whole

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

[file] = discover([Path(sys.argv[1])], DiscoveryOptions()).files
before = peak()
documents = characters = 0
faults = []
for document in SliceReader(whole(file), Reading("text", None, 1 << 20)):
    if isinstance(document, BadDocument):
        faults.append(f"{document.line} {document.fault}")
        continue
    documents += 1
    characters += sum(map(len, document.texts()))
print(documents, characters, ",".join(faults), (peak() - before) // 1024, sep=";")
"""
ROW = "x" * 20_000
ROWS = 12_000
DIGITS = sum(len(str(number)) for number in range(ROWS))
GOOD = b'{"text": "good"}\n'


def write_stream(path: Path) -> None:
    batch = pa.record_batch({"text": [ROW] * 500})
    with pa.ipc.new_stream(str(path), batch.schema) as writer:
        for _ in range(ROWS // 500):
            writer.write_batch(batch)


def write_batch(path: Path) -> None:
    """One batch, as `pandas.to_feather` and others write by default; it is not compressed."""
    batch = pa.record_batch({"other": [1] * ROWS, "text": pa.array([ROW] * ROWS)})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def write_table(path: Path) -> None:
    # Numbers, so that pages differ and nothing is kept in a dictionary.
    rows = [f"{number}{ROW}" for number in range(ROWS)]
    pq.write_table(
        pa.table({"text": rows}),
        path,
        compression="none",
        use_dictionary=False,
        write_batch_size=64,
    )


def write_hole(path: Path) -> None:
    """A line of 300 MB of nothing, after two good ones."""
    with path.open("wb") as stream:
        stream.write(GOOD * 2)
        stream.truncate(300 << 20)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + GOOD)


def write_bomb(path: Path) -> None:
    """The same, compressed to some kilobytes."""
    packer = zstandard.ZstdCompressor().compressobj()
    with path.open("wb") as stream:
        stream.write(packer.compress(GOOD * 2))
        for _ in range(300):
            stream.write(packer.compress(bytes(1 << 20)))
        stream.write(packer.compress(b"\n" + GOOD) + packer.flush())


def write_book(path: Path) -> None:
    with path.open("wb") as stream:
        for _ in range(200):
            stream.write(b"a line of a book\n" * 60_000)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rows.arrow": (write_stream, f"{ROWS};{ROWS * len(ROW)};"),
    "batch.arrow": (write_batch, f"{ROWS};{ROWS * len(ROW)};"),
    "rows.parquet": (write_table, f"{ROWS};{ROWS * len(ROW) + DIGITS};"),
    "hole.jsonl": (write_hole, "3;12;3 too long"),
    "bomb.jsonl.zst": (write_bomb, "3;12;3 too long"),
    "book.txt": (write_book, "1;204000000;"),
}


@pytest.mark.parametrize("name", CASES)
def test_reading_takes_little_memory_whatever_the_size(tmp_path: Path, name: str) -> None:
    write, expected = CASES[name]
    write(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, _, grown = done.stdout.rpartition(";")
    assert found == expected
    # Of 200 to 300 MB; how much Arrow's allocator holds varies with the load of the machine.
    assert int(grown) < 130
