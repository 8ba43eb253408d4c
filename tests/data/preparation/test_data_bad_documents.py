"""Bad documents by the million: they stop a build early, or pass through it on the disk alone."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from made_data import SilentListener, build, made_texts

from mamba_dist.data.preparation.bad_documents import BadSpool
from mamba_dist.data.preparation.documents import BadDocument
from mamba_dist.data.preparation.sources import InputFile, whole
from mamba_dist.errors import DataError


class Journal(SilentListener):
    """Looks at the journal after each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.journal_bytes = 0
        self.output = Path()

    def advanced(self, unit: object, record: object) -> None:
        [journal] = self.output.glob(".partial-*/journal.jsonl")
        self.journal_bytes = journal.stat().st_size


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_stops_at_the_first_bad_document_too_many(
    tokenizer_path: Path, tmp_path: Path, workers: int
) -> None:
    lines = ['{"body": "x"}'] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    listener = SilentListener()
    with pytest.raises(DataError, match=r"(?s)^8 bad documents, more than --max-bad 7.*a.jsonl:5:"):
        build(
            tmp_path / "a.jsonl",
            tmp_path / "set",
            tokenizer_path,
            listener=listener,
            max_bad=7,
            workers=workers,
        )
    assert listener.units == 0
    empty = tmp_path / "b.jsonl"
    empty.write_text('{"text": ""}\n' * 30 + "\n".join(map(json.dumps, _records(40))))
    result = build(empty, tmp_path / "other", tokenizer_path, max_bad=0, workers=workers)
    assert result.manifest.inputs.bad_documents == 30


def _records(count: int) -> list[dict[str, str]]:
    return [{"text": text} for text in made_texts(count)]


def test_empty_documents_are_neither_held_in_memory_nor_journalled() -> None:
    file = InputFile("a.jsonl", "a.jsonl", 1, 1, "jsonl", "none")

    class Nowhere(io.RawIOBase):
        def write(self, data: object) -> int:
            return len(data)  # type: ignore[arg-type]

    spool = BadSpool(Nowhere(), max_bad=0)  # type: ignore[arg-type]
    tracemalloc.start()
    for line in range(20_000):
        spool.add(whole(file), BadDocument("a.jsonl", line, "empty", ""))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000
    assert spool.faults == {"empty": 20_000}


def test_the_journal_does_not_grow_with_bad_documents(tokenizer_path: Path, tmp_path: Path) -> None:
    lines = ['{"text": ""}'] * 5000 + [json.dumps(record) for record in _records(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    listener = Journal()
    listener.output = tmp_path / "set"
    build(
        tmp_path / "a.jsonl",
        tmp_path / "set",
        tokenizer_path,
        listener=listener,
        unit_bytes=1 << 20,
    )
    assert 0 < listener.journal_bytes < 1000
    listed = (tmp_path / "set" / "bad_documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == list(range(1, 5001))
