import gzip
import io
import json
import lzma
import os
import shutil
from pathlib import Path

import pytest
import zstandard

from mamba_dist.data.preparation.sources import InputFile
from mamba_dist.data.preparation.standard_input import discard_standard_input, keep_standard_input
from mamba_dist.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def keep(data: bytes, output: Path, *, overwrite: bool = False) -> InputFile:
    return keep_standard_input(io.BytesIO(data), output, content="jsonl", overwrite=overwrite)


@pytest.mark.parametrize(
    ("pack", "compression"),
    [
        (bytes, "none"),
        (gzip.compress, "gzip"),
        (zstandard.compress, "zstd"),
        (lzma.compress, "xz"),
    ],
)
def test_what_comes_in_is_kept_as_it_is(tmp_path: Path, pack: object, compression: str) -> None:
    data = pack(LINES)  # type: ignore[operator]
    file = keep(data, tmp_path / "set")
    assert Path(file.path).read_bytes() == data
    assert (file.name, file.bytes, file.format) == ("stdin", len(data), "jsonl")
    assert file.compression == compression
    assert [path.name for path in (tmp_path / "set").iterdir()] == [".stdin"]


def test_the_same_input_again_or_none_is_the_file_that_was_kept(tmp_path: Path) -> None:
    file = keep(LINES, tmp_path)
    os.utime(file.path, ns=(1, 1))
    file = keep(LINES, tmp_path)
    assert file.changed_at_ns == 1
    assert keep(b"", tmp_path) == file


def test_other_input_is_refused_until_it_may_overwrite(tmp_path: Path) -> None:
    file = keep(LINES, tmp_path)
    unfinished = tmp_path / ".partial-0"
    unfinished.mkdir()
    (unfinished / "plan.json").write_text(json.dumps({"inputs": [["stdin", file.bytes]]}))
    with pytest.raises(DataError, match="unfinished data set made of other standard input"):
        keep(LINES * 2, tmp_path)
    assert keep(b"", tmp_path) == file
    assert keep(LINES * 2, tmp_path, overwrite=True).bytes == 2 * len(LINES)
    discard_standard_input(tmp_path)
    assert (tmp_path / ".stdin").exists()
    shutil.rmtree(unfinished)
    assert keep(LINES, tmp_path).bytes == len(LINES)
    discard_standard_input(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert keep(LINES, tmp_path).bytes == len(LINES)


def test_what_a_kill_left_half_read_goes_away(tmp_path: Path) -> None:
    (tmp_path / ".stdin.partial").write_bytes(b"half")
    discard_standard_input(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_empty_input_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="standard input is empty; pipe text into it"):
        keep(b"", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_is_not_waited_for(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    with (
        open(theirs, "rb", buffering=0) as terminal,
        open(ours, "rb"),
        pytest.raises(DataError, match="standard input is a terminal"),
    ):
        keep_standard_input(terminal, tmp_path, content="text", overwrite=False)  # type: ignore[arg-type]


class BreaksOff(io.RawIOBase):
    def __init__(self) -> None:
        self._left = [b"some", b"more"]

    def read(self, size: int = -1) -> bytes:
        if not self._left:
            raise KeyboardInterrupt
        return self._left.pop(0)


def test_an_interrupted_input_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        keep_standard_input(BreaksOff(), tmp_path, content="text", overwrite=False)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
