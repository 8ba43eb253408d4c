import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_data import build, folder_bytes, made_texts

from mamba_dist.data import document_ids
from mamba_dist.data.archive import pack_dataset, read_packed, unpack_dataset
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.document_ids import find_document_id
from mamba_dist.data.verification import dataset_problems
from mamba_dist.errors import DataError

TEXTS = made_texts(60, seed=8)


def ids_of(folder: Path) -> list[str | None]:
    count = open_dataset(folder).manifest.inputs.documents
    return [find_document_id(folder, doc_id) for doc_id in range(count)]


def write_corpus(folder: Path) -> list[str | None]:
    """Three files of all kinds of ids, and the ids of their good documents."""
    folder.mkdir()
    values: list[object] = ["a-1", 7, 2**80, None, "é\n", True, 1.5, "\ud800", -3, ""]
    expected = ["a-1", "7", str(2**80), None, "é\n", None, None, None, "-3", ""]
    lines = [json.dumps({"text": text, "key": values[n % 10]}) for n, text in enumerate(TEXTS[:40])]
    lines.insert(20, json.dumps({"text": "", "key": "of an empty one"}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text(TEXTS[40])
    keys = [f"row {number}" for number in range(19)]
    pq.write_table(pa.table({"key": keys, "text": TEXTS[41:]}), folder / "c.parquet")
    return [*expected * 4, None, *keys]


def test_each_document_keeps_the_id_of_its_source_beside_equal_shards(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(document_ids, "BATCH_ROWS", 7)
    build(tmp_path / "corpus", tmp_path / "without", tokenizer_path)
    result = build(tmp_path / "corpus", tmp_path / "with", tokenizer_path, id_field="key")
    assert ids_of(tmp_path / "with") == expected
    assert result.manifest.fingerprint == open_dataset(tmp_path / "without").manifest.fingerprint
    new = set(folder_bytes(tmp_path / "with")) - set(folder_bytes(tmp_path / "without"))
    assert new == {"document_ids.arrow"}
    build(tmp_path / "corpus", tmp_path / "again", tokenizer_path, id_field="key", workers=2)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "with")
    assert build(
        tmp_path / "corpus", tmp_path / "with", tokenizer_path, id_field="key"
    ).was_complete
    with pytest.raises(DataError, match=r"id_field was 'key', is None"):
        build(tmp_path / "corpus", tmp_path / "with", tokenizer_path)
    build(tmp_path / "corpus", tmp_path / "with", tokenizer_path, overwrite=True)
    assert folder_bytes(tmp_path / "with") == folder_bytes(tmp_path / "without")


def test_ids_are_packed_and_verified_like_the_rest(tokenizer_path: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    manifest = build(tmp_path / "corpus", tmp_path / "set", tokenizer_path, id_field="key").manifest

    def problems() -> list[str]:
        found = dataset_problems(tmp_path / "set", manifest, depth="xxh3", advance=lambda _: None)
        return [str(problem) for problem in found]

    assert problems() == []
    pack_dataset(tmp_path / "set", tmp_path / "p", level=1, threads=0, advance=lambda _: None)
    index = read_packed(tmp_path / "p")
    unpack_dataset(tmp_path / "p", tmp_path / "back", index=index, advance=lambda _: None)
    assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "set")
    (tmp_path / "set" / "document_ids.arrow").write_bytes(b"ARROW1 and nothing else")
    assert [problem.partition(":")[0] for problem in problems()] == ["document_ids.arrow"]
    with pytest.raises(DataError, match=r"document_ids.arrow cannot be read"):
        find_document_id(tmp_path / "set", 0)


def test_a_field_that_gives_no_id_at_all_is_an_error(tokenizer_path: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "c.parquet").unlink()
    with pytest.raises(DataError, match=r"no document has an id .* in the field 'kye'"):
        build(tmp_path / "corpus", tmp_path / "set", tokenizer_path, id_field="kye")
    assert list((tmp_path / "set").iterdir()) == []  # so nothing was tokenised
    build(tmp_path / "corpus", tmp_path / "set", tokenizer_path, id_field="key")


def test_a_note_is_gone_though_its_disk_is_full(tmp_path: Path) -> None:
    note = document_ids.IdNote(tmp_path, 0)
    full = open("/dev/full", "wb")  # noqa: SIM115
    note._stream.close()
    note._stream = full
    note.add("an id")
    note.discard()
    assert full.closed
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_the_column_of_ids_names_those_it_has(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"no column 'kye', only key, text; choose one by --id-f"):
        build(tmp_path / "corpus", tmp_path / "set", tokenizer_path, id_field="kye")


def test_a_damaged_place_of_an_id_is_an_error_and_no_end_of_the_process(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.string())])
    batch = pa.record_batch([pa.array(["one", None, "three"])], schema=schema)
    path = tmp_path / document_ids.DOCUMENT_IDS_NAME
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    whole = path.read_bytes()
    offsets = b"".join(place.to_bytes(4, "little") for place in (0, 3, 3, 8))
    assert whole.count(offsets) == 1
    for byte in range(4, 16):
        content = bytearray(whole)
        content[whole.index(offsets) + byte] ^= 0x80
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"document_ids\.arrow cannot be read"):
            find_document_id(tmp_path, 2)
    path.write_bytes(whole)
    assert [find_document_id(tmp_path, number) for number in range(3)] == ["one", None, "three"]
