import dataclasses
import gzip
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from made_data import made_texts

from mamba_dist.data.durable import quick_hash
from mamba_dist.data.preparation.documents import (
    AnyDocument,
    BadDocument,
    Document,
    LongDocument,
    Reading,
    SliceReader,
    lines_before,
    read_documents,
)
from mamba_dist.data.preparation.sources import DiscoveryOptions, InputSlice, discover, whole
from mamba_dist.errors import DataError

TEXTS = made_texts(3000)


def read(path: Path, text_field: str = "text") -> list[AnyDocument]:
    [file] = discover([path], DiscoveryOptions()).files
    return list(read_documents(file, text_field))


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(
        pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=700
    )


def write_arrow(path: Path, texts: list[str], *, stream: bool) -> None:
    table = pa.table({"text": texts})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1700)


def with_window(data: bytes, window_log: int) -> bytes:
    """A zstd frame that needs a window of two to the power of `window_log`."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(json_lines(TEXTS)),
    "a.json": lambda p: p.write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS).rstrip(b"\n")),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(TEXTS))),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(json_lines(TEXTS))),
    "a.jsonl.xz": lambda p: p.write_bytes(lzma.compress(json_lines(TEXTS))),
    "frames.jsonl.zst": lambda p: p.write_bytes(
        zstandard.compress(json_lines(TEXTS[:99])) + zstandard.compress(json_lines(TEXTS[99:]))
    ),
    "members.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(json_lines(TEXTS[:99])) + gzip.compress(json_lines(TEXTS[99:]))
    ),
    "padded.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(TEXTS)) + bytes(1 << 17)),
    "padded.jsonl.xz": lambda p: p.write_bytes(
        lzma.compress(json_lines(TEXTS[:99])) + bytes(4) + lzma.compress(json_lines(TEXTS[99:]))
    ),
    "window.jsonl.zst": lambda p: p.write_bytes(with_window(json_lines(TEXTS), 27)),
    "a.parquet": lambda p: write_parquet(p, TEXTS),
    "file.arrow": lambda p: write_arrow(p, TEXTS, stream=False),
    "stream.arrow": lambda p: write_arrow(p, TEXTS, stream=True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    found = read(tmp_path / name)
    assert found == [Document(text, line) for line, text in enumerate(TEXTS, 1)]


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# head\r\n\r\nbody\n")
    assert read(tmp_path / "a.md") == [Document("# head\r\n\r\nbody\n", 1)]


def test_bad_lines_are_named_and_the_others_are_kept(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "cut',
        b'{"body": "x", "url": "y"}',
        b'{"text": 5}',
        b"[1, 2]",
        b"",
        b'{"text": "  \\n "}',
        b'{"text": "\\ud800"}',
        b'{"text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert [d.text for d in found if isinstance(d, Document)] == ["good", "also good"]
    bad = [(d.line, d.fault) for d in found if isinstance(d, BadDocument)]
    assert bad == [
        (2, "not UTF-8"),
        (3, "broken JSON"),
        (4, "no text field"),
        (5, "no text field"),
        (6, "no text field"),
        (8, "empty"),
        (9, "not UTF-8"),
    ]
    assert "a.jsonl:4: no text field (fields: body, url)" in [str(d) for d in found]


def test_an_id_that_is_a_lone_surrogate_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "id": "\\ud800"}\n{"text": "b", "id": "\\ud83d\\ude00"}\n'
    )
    [file] = discover([tmp_path / "a.jsonl"], DiscoveryOptions()).files
    found = list(SliceReader(whole(file), Reading("text", "id")))
    assert found == [Document("a", 1), Document("b", 2, "\U0001f600")]


def test_what_is_said_of_a_bad_line_is_short_however_long_its_names_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"k" * 100_000: 1}))
    [bad] = read(path)
    assert isinstance(bad, BadDocument)
    assert bad.detail.startswith("fields: kkk")
    assert len(bad.detail) < 1000


def test_a_text_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    [bad] = read(tmp_path / "a.txt")
    assert isinstance(bad, BadDocument)
    assert (bad.line, bad.fault) == (3, "not UTF-8")


def test_an_empty_file_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"")
    [bad] = read(tmp_path / "a.py")
    assert isinstance(bad, BadDocument)
    assert bad.fault == "empty"


def test_null_rows_of_a_table_are_bad_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert isinstance(found[1], BadDocument)
    assert (found[1].line, found[1].fault) == (2, "no text field")


def test_another_text_field_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x", "y"], field="body"))
    assert [d.text for d in read(tmp_path / "a.jsonl", "body") if isinstance(d, Document)] == [
        "x",
        "y",
    ]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_table_without_the_column_names_those_it_has(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"has no column 'body', only .*text; choose one by"):
        read(tmp_path / name, "body")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"])
@pytest.mark.parametrize("kept", [-3, 2000, 9])
def test_a_compressed_stream_that_is_cut_short_is_an_error(
    tmp_path: Path, name: str, kept: int
) -> None:
    WRITERS[name](tmp_path / name)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"{name} is cut short"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"plain text, nothing else" * 10)
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize("frames", [0, 3])
def test_a_zstd_frame_that_needs_much_memory_is_named_so(tmp_path: Path, frames: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    before = zstandard.compress(json_lines(TEXTS[:9])) * frames
    path.write_bytes(before + with_window(json_lines(TEXTS), 28))
    expected = r"a.jsonl.zst needs a window of 268,435,456 bytes .*recompress it by zstd --long=27"
    with pytest.raises(DataError, match=expected):
        read(path)


def with_dictionary(data: bytes, code: int) -> bytes:
    """An xz stream that asks for a dictionary of this code: 30 is 128 MiB, 31 is 192 MiB."""
    packed = bytearray(lzma.compress(data))
    packed[16] = code
    packed[20:24] = zlib.crc32(packed[12:20]).to_bytes(4, "little")
    return bytes(packed)


def test_an_xz_stream_that_needs_much_memory_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(with_dictionary(json_lines(TEXTS), 30))
    assert len(read(path)) == len(TEXTS)
    path.write_bytes(lzma.compress(json_lines(TEXTS)) + with_dictionary(json_lines(TEXTS), 31))
    expected = r"a.jsonl.xz needs a dictionary of more than 134,217,728 bytes .*by xz -9 or less"
    with pytest.raises(DataError, match=expected):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"])
def test_what_is_no_padding_after_a_compressed_stream_is_damage(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + bytes(8) + b"something else" * 20)
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_a_truncated_table_is_an_error(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*a.txt: Permission denied"):
        read(path)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    [file] = discover([path], DiscoveryOptions()).files
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a.txt: No such file"):
        list(read_documents(file, "text"))


def read_in_slices(path: Path, cuts: list[int], reading: Reading) -> list[AnyDocument]:
    """The documents of all slices, their lines counted from the file's beginning."""
    [file] = discover([path], DiscoveryOptions()).files
    found: list[AnyDocument] = []
    lines = 0
    for start, stop in itertools.pairwise([0, *cuts, file.bytes]):
        piece = InputSlice(file, start, stop)
        assert lines_before(piece) == lines
        reader = SliceReader(piece, reading)
        found += [dataclasses.replace(document, line=document.line + lines) for document in reader]
        lines += reader.lines
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "file.arrow"])
@pytest.mark.parametrize("shares", [(0.5,), (0.0001, 0.3, 0.3001, 0.31, 0.999), (0.1, 0.2, 0.4)])
def test_slices_give_the_documents_and_lines_of_the_whole(
    tmp_path: Path, name: str, shares: tuple[float, ...]
) -> None:
    WRITERS[name](tmp_path / name)
    size = (tmp_path / name).stat().st_size
    cuts = [int(share * size) for share in shares]
    found = read_in_slices(tmp_path / name, cuts, Reading("text"))
    assert found == [Document(text, line) for line, text in enumerate(TEXTS, 1)]


@pytest.mark.parametrize(
    ("name", "rows"), [("a.parquet", [2100, 900]), ("file.arrow", [1700, 1300])]
)
def test_a_slice_of_a_table_reads_its_own_rows_only(
    tmp_path: Path, name: str, rows: list[int]
) -> None:
    WRITERS[name](tmp_path / name)
    [file] = discover([tmp_path / name], DiscoveryOptions()).files
    middle = file.bytes // 2
    halves = InputSlice(file, 0, middle), InputSlice(file, middle, file.bytes)
    assert [len(list(SliceReader(half, Reading("text")))) for half in halves] == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.md"])
def test_a_file_that_passes_by_whole_is_hashed_on_the_way(tmp_path: Path, name: str) -> None:
    WRITERS.get(name, WRITERS["a.jsonl"])(tmp_path / name)
    [file] = discover([tmp_path / name], DiscoveryOptions()).files
    reader = SliceReader(whole(file), Reading("text"))
    assert list(reader)
    assert reader.xxh3 == quick_hash(tmp_path / name)
    half = SliceReader(InputSlice(file, 0, file.bytes // 2), Reading("text"))
    assert list(half)
    assert half.xxh3 is None or name != "a.jsonl"


LIMITED = Reading("text", None, 300)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "file.arrow", "stream.arrow"]
)
def test_a_record_over_the_limit_is_bad_and_the_others_are_kept(tmp_path: Path, name: str) -> None:
    texts = ["short", "é" * 200, "fine", "z" * 900_000, "last"]
    one_row_groups = name == "a.parquet"
    if one_row_groups:
        pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=1)
    elif name.endswith(".arrow"):
        write_arrow(tmp_path / name, texts, stream=name == "stream.arrow")
    else:
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        data = lines.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    [file] = discover([tmp_path / name], DiscoveryOptions()).files
    found = list(SliceReader(whole(file), LIMITED))
    assert [d.text for d in found if isinstance(d, Document)] == ["short", "fine", "last"]
    bad = [str(d) for d in found if isinstance(d, BadDocument)]
    assert bad == [
        f"{name}:{line}: too long (over 300 bytes; see --max-record-bytes)" for line in (2, 4)
    ]


@pytest.mark.parametrize("name", ["long.txt", "long.txt.gz", "long.txt.zst"])
def test_a_long_text_file_is_not_held_in_memory(tmp_path: Path, name: str) -> None:
    text = "".join(f"{number} zwölf Boxkämpfer 東京\r\n" for number in range(40_000))
    data = b"\xef\xbb\xbf" + text.encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}
    (tmp_path / name).write_bytes(packed.get(Path(name).suffix, bytes)(data))
    [file] = discover([tmp_path / name], DiscoveryOptions()).files
    reader = SliceReader(whole(file), Reading("text"))
    [document] = reader
    assert isinstance(document, LongDocument)
    for _ in range(2):
        assert "".join(document.texts()) == text
    assert max(map(len, document.texts())) <= 1 << 17
    assert reader.xxh3 == quick_hash(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "line", "fault"),
    [
        (b"line\n" * 300_000 + b"\xe9\n" + b"line\n" * 9, 300_001, "not UTF-8"),
        (b"line\n" * 300_000 + b"\xc3", 300_001, "not UTF-8"),
        (b" \n" * 600_000, 1, "empty"),
    ],
)
def test_a_long_text_file_that_is_bad_names_the_line(
    tmp_path: Path, data: bytes, line: int, fault: str
) -> None:
    (tmp_path / "long.txt").write_bytes(data)
    [bad] = read(tmp_path / "long.txt")
    assert isinstance(bad, BadDocument)
    assert (bad.line, bad.fault) == (line, fault)


def test_a_file_that_changes_between_two_readings_is_named(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"line\n" * 300_000)
    [document] = read(tmp_path / "long.txt")
    assert isinstance(document, LongDocument)
    (tmp_path / "long.txt").write_bytes(b"caf\xe9\n" * 300_000)
    with pytest.raises(DataError, match=r"long.txt changed while it was read"):
        list(document.texts())
