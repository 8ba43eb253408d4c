"""inputs.jsonl and bad_documents.jsonl: what each input file gave, by the records of its slices;
and how many of its documents may be bad.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mamba_dist.data.durable import hash_file, write_durably
from mamba_dist.data.manifest import BAD_DOCUMENTS_NAME, INPUTS_NAME
from mamba_dist.data.preparation.documents import BadDocument, lines_before
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.sources import InputSlice, Unit
from mamba_dist.errors import DataError

_NAMED_BAD = 5


@dataclass(frozen=True)
class InputLists:
    """`inputs_sha256` is inputs.jsonl's; the lines of the bad documents are those of the file."""

    inputs_sha256: str
    bad: list[BadDocument]


def write_lists(folder: Path, records: Sequence[PartRecord]) -> InputLists:
    """Writes both lists, of the records of all units in order."""
    inputs = "".join(json.dumps(line) + "\n" for line in _input_lines(records))
    write_durably(folder / INPUTS_NAME, inputs.encode())
    bad = list(_bad_documents(records))
    listed = "".join(json.dumps(vars(document)) + "\n" for document in bad)
    write_durably(folder / BAD_DOCUMENTS_NAME, listed.encode())
    return InputLists(hash_file(folder / INPUTS_NAME).sha256, bad)


def _input_lines(records: Sequence[PartRecord]) -> Iterator[dict[str, str | int]]:
    line: dict[str, str | int] = {}
    first, documents = 0, 0
    for file in (file for record in records for file in record.files):
        if file.xxh3 is not None:
            if line:
                yield line
            first += documents
            documents = 0
            line = {"name": file.name, "bytes": file.bytes, "xxh3": file.xxh3}
        documents += file.documents
        line |= {"documents": documents, "first_doc_id": first}
    if line:
        yield line


def _bad_documents(records: Sequence[PartRecord]) -> Iterator[BadDocument]:
    lines = 0
    for record in records:
        bad = iter(record.bad)
        for file in record.files:
            if file.xxh3 is not None:
                lines = 0
            for document in islice(bad, file.bad):
                yield replace(document, line=document.line + lines)
            lines += file.lines


def counted_bad(unit: Unit, record: PartRecord) -> list[tuple[InputSlice, BadDocument]]:
    """The bad documents that count, each with the slice from whose beginning its line counts."""
    slices = (
        piece
        for piece, file in zip(unit.slices, record.files, strict=True)
        for _ in range(file.bad)
    )
    found = zip(slices, record.bad, strict=True)
    return [(piece, document) for piece, document in found if document.fault != "empty"]


def check_bad(bad: Sequence[tuple[InputSlice, BadDocument]], max_bad: int) -> None:
    """Nothing, if no more than `max_bad` documents are bad.

    Raises:
        DataError: there are more; some of them are named by file and line.
    """
    if len(bad) > max_bad:
        named = [
            replace(document, line=document.line + lines_before(piece))
            for piece, document in bad[:_NAMED_BAD]
        ]
        listed = "".join(f"\n  {document}" for document in named)
        raise DataError(
            f"{len(bad)} bad documents, more than --max-bad {max_bad}; among them:{listed}\n"
            "mend or --exclude these files, check --text-field, or allow more by --max-bad"
        )
