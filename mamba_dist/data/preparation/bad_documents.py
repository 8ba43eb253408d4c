"""The bad documents of a unit: counted, and kept at the end of its part.

A corpus may have millions of them, empty ones above all, so no list of them is held in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO

from mamba_dist.data.preparation.documents import BadDocument, lines_before
from mamba_dist.data.preparation.part_records import PartRecord, part_path
from mamba_dist.data.preparation.sources import InputSlice, Unit
from mamba_dist.errors import ChangedPartError, DataError

_EMPTY = "empty"
_NAMED = 5

# A document, and the slice from whose beginning its line counts.
Placed = tuple[InputSlice, BadDocument]


class BadSpool:
    """The bad documents of one unit as they come, one line of JSON each in `stream`.

    More than `max_bad` that count, those that are not empty, end the work on the unit.
    """

    def __init__(self, stream: IO[bytes], *, max_bad: int) -> None:
        self.faults: Counter[str] = Counter()
        self.bytes = 0
        self._stream = stream
        self._max_bad = max_bad
        self._first: list[Placed] = []

    def add(self, piece: InputSlice, document: BadDocument) -> None:
        """Keeps the next one.

        Raises:
            DataError: it is one too many.
        """
        self.bytes += self._stream.write(json.dumps(vars(document)).encode() + b"\n")
        self.faults[document.fault] += 1
        if document.fault == _EMPTY:
            return
        if len(self._first) < _NAMED:
            self._first.append((piece, document))
        count = counted(self.faults)
        if count > self._max_bad:
            raise _too_many(count, self._max_bad, self._first)


def counted(faults: Mapping[str, int]) -> int:
    """How many bad documents count: source trees are full of empty files."""
    return sum(number for fault, number in faults.items() if fault != _EMPTY)


def read_bad(folder: Path, record: PartRecord) -> Iterator[BadDocument]:
    """The bad documents of a unit, in order, their lines counted from their slice's beginning.

    Raises:
        ChangedPartError: they are not what was written.
    """
    if not record.bad_bytes:
        return
    path = part_path(folder, record.unit)
    with path.open("rb") as stream:
        stream.seek(record.bytes - record.bad_bytes)
        try:
            for line in stream:
                yield BadDocument(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ChangedPartError(path, record.unit) from error


def check_bad(
    folder: Path, units: Mapping[int, Unit], records: Iterable[PartRecord], *, max_bad: int
) -> int:
    """How many bad documents of `records` count; no more than `max_bad`.

    Raises:
        DataError: there are more; some of them are named by file and line.
    """
    spoilt = [record for record in records if counted(record.faults)]
    count = sum(counted(record.faults) for record in spoilt)
    if count > max_bad:
        found = (at for record in spoilt for at in _placed(folder, units[record.unit], record))
        raise _too_many(count, max_bad, list(islice(found, _NAMED)))
    return count


def _placed(folder: Path, unit: Unit, record: PartRecord) -> Iterator[Placed]:
    bad = read_bad(folder, record)
    for piece, file in zip(unit.slices, record.files, strict=True):
        for document in islice(bad, file.bad):
            if document.fault != _EMPTY:
                yield piece, document


def _too_many(count: int, max_bad: int, first: list[Placed]) -> DataError:
    named = [
        replace(document, line=document.line + lines_before(piece)) for piece, document in first
    ]
    listed = "".join(f"\n  {document}" for document in named)
    return DataError(
        f"{count} bad documents, more than --max-bad {max_bad}; among them:{listed}\n"
        "there may be more where the work stopped; mend or --exclude these files, check "
        "--text-field, or allow more by --max-bad"
    )
