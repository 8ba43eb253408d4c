"""Documents of Parquet and Arrow files of all kinds of columns, and of such that are damaged."""

import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_data import made_texts

from mamba_dist.data.preparation.documents import (
    AnyDocument,
    BadDocument,
    Document,
    Reading,
    SliceReader,
    lines_before,
)
from mamba_dist.data.preparation.sources import DiscoveryOptions, InputSlice, discover, whole
from mamba_dist.errors import DataError

NAMES = ["a.parquet", "file.arrow", "stream.arrow"]
# Together more than what is read at a time, each for itself less than what may be read.
TEXTS = [f"{number} " + "long " * 1000 for number in range(1200)]


def read(
    path: Path, most_bytes: int = 1 << 20, *, id_field: str | None = "id"
) -> list[AnyDocument]:
    [file] = discover([path], DiscoveryOptions()).files
    return list(SliceReader(whole(file), Reading("text", id_field, most_bytes)))


def write(path: Path, table: pa.Table, *, rows: int = 1000, compression: str | None = None) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return
    new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)


def strings_of(values: list[bytes]) -> pa.Array:
    """A column of strings that need not be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def run_ends(values: pa.Array) -> pa.Array:
    ends = pa.array(range(1, len(values) + 1), pa.int32())
    return pa.RunEndEncodedArray.from_arrays(ends, values)


KINDS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "large": lambda array: array.cast(pa.large_string()),
    "dictionary": lambda array: array.dictionary_encode(),
    "dictionary of large": lambda array: array.cast(pa.large_string()).dictionary_encode(),
    "views": lambda array: array.cast(pa.string_view()),
    "runs": run_ends,
}


def exists(name: str, kind: str) -> bool:
    """Whether a file has columns of such a kind: Parquet has no views and runs."""
    return name != "a.parquet" or kind not in ("views", "runs")


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in product(NAMES, KINDS) if exists(*pair)]
)
def test_columns_of_every_kind_of_string_give_the_same_documents(
    tmp_path: Path, name: str, kind: str
) -> None:
    texts: list[str | None] = [*TEXTS, None, TEXTS[7], "z" * 8000]
    ids = [None if number % 5 == 0 else f"id {number % 300}" for number in range(len(texts))]
    as_kind = KINDS[kind]
    table = pa.table({"id": as_kind(pa.array(ids)), "text": as_kind(pa.array(texts))})
    write(tmp_path / name, table, rows=700)
    *found, null, seventh, long = read(tmp_path / name, 7000)
    assert found == [Document(text, n + 1, ids[n]) for n, text in enumerate(TEXTS)]
    assert [str(bad).partition(":")[2] for bad in (null, long)] == [
        "1201: no text field (the value is NoneType)",
        "1203: too long (over 7,000 bytes; see --max-record-bytes)",
    ]
    assert seventh == Document(TEXTS[7], 1202, ids[1201])


@pytest.mark.parametrize("name", NAMES)
def test_ids_may_be_numbers_in_a_dictionary(tmp_path: Path, name: str) -> None:
    ids = pa.array([3, None, 3, 10**12]).dictionary_encode()
    write(tmp_path / name, pa.table({"text": TEXTS[:4], "id": ids}))
    assert read(tmp_path / name) == [
        Document(text, line, source_id)
        for line, (text, source_id) in enumerate(
            zip(TEXTS[:4], ["3", None, "3", "1000000000000"], strict=True), 1
        )
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_long_id_is_too_long(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, pa.table({"text": ["a", "b", "c"], "id": ["x", "y" * 99, "z"]}))
    found = read(tmp_path / name, 50)
    assert found[::2] == [Document("a", 1, "x"), Document("c", 3, "z")]
    assert str(found[1]).endswith(":2: too long (over 50 bytes; see --max-record-bytes)")


def test_a_text_as_long_as_the_limit_is_taken_from_a_row_group_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"text": ["x" * 300, "x" * 301]}), rows=1)
    found = read(tmp_path / "a.parquet", 300, id_field=None)
    assert found[0] == Document("x" * 300, 1)
    assert isinstance(found[1], BadDocument)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_a_string_that_is_not_utf8_is_a_bad_document_of_its_row(
    tmp_path: Path, name: str, is_dictionary: bool
) -> None:
    texts = strings_of([b"good", b"caf\xe9", b"fine", b"last"])
    ids = strings_of([b"a", b"b", b"\xff", b"d"])
    if is_dictionary:
        indices = pa.array(range(4), pa.int8())
        texts, ids = (pa.DictionaryArray.from_arrays(indices, each) for each in (texts, ids))
    write(tmp_path / name, pa.table({"text": texts, "id": ids}))
    if is_dictionary and name == "a.parquet":
        # Arrow itself refuses to read these.
        with pytest.raises(DataError, match="is damaged: Invalid UTF8"):
            read(tmp_path / name)
        return
    found = read(tmp_path / name)
    assert isinstance(found[1], BadDocument)
    assert (found[1].line, found[1].fault) == (2, "not UTF-8")
    # An id that is not UTF-8 counts as none.
    found.pop(1)
    assert found == [Document("good", 1, "a"), Document("fine", 3), Document("last", 4, "d")]


def test_values_that_are_no_text_are_bad_documents(tmp_path: Path) -> None:
    values = [[{"a": "x"}, None], [b"bytes"], [1.5], [True], [7]]
    details = ["struct<a: string>", "binary", "double", "bool", "int"]
    for value, detail in zip(values, details, strict=True):
        write(tmp_path / "file.arrow", pa.table({"text": value, "id": value}))
        bad, *null = read(tmp_path / "file.arrow")
        assert str(bad) == f"file.arrow:1: no text field (the value is {detail})"
        assert len(null) == len(value) - 1


@pytest.mark.parametrize("name", NAMES)
def test_two_columns_of_the_name_asked_for_are_an_error(tmp_path: Path, name: str) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, ["text", "id", "text"])
    write(tmp_path / name, twice)
    with pytest.raises(DataError, match=r"has 2 columns 'text'.*choose another by --text-field"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_columns_that_are_not_asked_for_are_not_decompressed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    blob = random.Random(1).randbytes(3000)
    table = pa.table({"a": [b"a"], "blob": [blob], "text": ["b"], "id": ["i"]})
    write(path, table, compression="zstd")
    data = path.read_bytes()
    # Random bytes are stored as they are, behind what begins a frame: its magic number and so on.
    start = data.index(blob)
    path.write_bytes(data[: start - 10] + bytes(10) + data[start:])
    opened = pa.ipc.open_stream if name == "stream.arrow" else pa.ipc.open_file
    with pytest.raises(OSError, match="ZSTD"):
        opened(path.read_bytes()).read_all()
    assert read(path) == [Document("b", 1, "i")]


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    chosen = random.Random(len(content))
    for _ in range(count):
        wrong = bytearray(content)
        for _ in range(chosen.choice((1, 1, 4))):
            wrong[chosen.randrange(len(wrong))] = chosen.randrange(256)
        yield bytes(wrong) if chosen.random() < 0.7 else content[: chosen.randrange(len(content))]


@pytest.mark.parametrize(
    ("name", "kind"),
    [pair for pair in product(NAMES, ["large", "dictionary", "views"]) if exists(*pair)],
)
def test_damage_of_any_kind_is_an_error_that_names_the_file(
    tmp_path: Path, name: str, kind: str
) -> None:
    texts = KINDS[kind](pa.array(made_texts(60)))
    path = tmp_path / name
    write(path, pa.table({"text": texts, "id": [str(n % 7) for n in range(60)]}), rows=20)
    errors: list[str] = []
    for content in damaged(path.read_bytes(), 100):
        path.write_bytes(content)
        try:
            read(path)  # what was damaged may be a text
        except DataError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert all(str(path) in error for error in errors)


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_an_offset_out_of_the_file_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, pa.table({"text": ["a" * 51, "b" * 70], "id": ["x", "y"]}))
    offsets = b"".join(value.to_bytes(4, "little") for value in (0, 51, 121))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little")))
    with pytest.raises(DataError, match=rf"{name} is damaged: .*; replace or --exclude it"):
        read(path)


def test_many_units_of_a_table_parse_its_footer_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write(path, pa.table({"text": made_texts(300)}), rows=3)
    [file] = discover([path], DiscoveryOptions()).files
    parsed = []
    opened = pq.ParquetFile

    def open_parquet(*args: object, **options: object) -> pq.ParquetFile:
        parsed.append(options.get("metadata") is None)
        return opened(*args, **options)

    monkeypatch.setattr(pq, "ParquetFile", open_parquet)
    rows = 0
    for start in range(0, file.bytes, 1000):
        piece = InputSlice(file, start, min(start + 1000, file.bytes))
        assert lines_before(piece) == rows
        rows += len(list(SliceReader(piece, Reading("text"))))
    assert rows == 300
    assert sum(parsed) == 1
