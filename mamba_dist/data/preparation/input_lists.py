"""inputs.jsonl and bad_documents.jsonl: what each input file gave, by the records of its slices."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mamba_dist.data.durable import hash_file
from mamba_dist.data.manifest import BAD_DOCUMENTS_NAME, INPUTS_NAME
from mamba_dist.data.preparation.bad_documents import read_bad
from mamba_dist.data.preparation.documents import BadDocument
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.sources import InputFile


@dataclass(frozen=True)
class InputLists:
    """`inputs_sha256` is inputs.jsonl's; `bad` documents are listed, this is the `first` of them,
    with its line in the file.
    """

    inputs_sha256: str
    bad: int
    first: BadDocument | None


def write_lists(
    folder: Path, parts: Path, records: Sequence[PartRecord], *, files: Sequence[InputFile]
) -> InputLists:
    """Writes both lists into `folder`, of the records of all units in order, whose parts lie in
    `parts`; `files` are what the units were cut from.

    Raises:
        ChangedPartError: a part is not what was journalled.
    """
    inputs = (
        line | {"format": file.format, "compression": file.compression}
        for line, file in zip(_input_lines(records), files, strict=True)
    )
    _write_lines(folder / INPUTS_NAME, inputs)
    listed = _bad_documents(parts, records)
    _write_lines(folder / BAD_DOCUMENTS_NAME, map(vars, listed))
    return InputLists(
        hash_file(folder / INPUTS_NAME).sha256,
        sum(sum(record.faults.values()) for record in records),
        next(_bad_documents(parts, records), None),
    )


def _write_lines(path: Path, lines: Iterable[object]) -> None:
    with path.open("wb") as stream:
        for line in lines:
            stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


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


def _bad_documents(parts: Path, records: Sequence[PartRecord]) -> Iterator[BadDocument]:
    lines = 0
    for record in records:
        bad = read_bad(parts, record)
        for file in record.files:
            if file.xxh3 is not None:
                lines = 0
            for document in islice(bad, file.bad):
                yield replace(document, line=document.line + lines)
            lines += file.lines
