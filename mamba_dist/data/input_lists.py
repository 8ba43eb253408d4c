"""inputs.jsonl and bad_documents.jsonl: what each input file gave, by the records of its slices."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mamba_dist.data.documents import BadDocument
from mamba_dist.data.durable import hash_file, write_durably
from mamba_dist.data.part_records import PartRecord

INPUTS_NAME = "inputs.jsonl"
BAD_DOCUMENTS_NAME = "bad_documents.jsonl"


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
