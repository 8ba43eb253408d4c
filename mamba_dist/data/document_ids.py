"""The id that each document has in its source, kept beside the shards: document_ids.arrow.

    id: string, nullable    row n is document n of the data set; null where the source gave none

An Arrow IPC file; the shards are the same with it and without. Every batch but the last has
BATCH_ROWS rows, so the one that holds a doc_id is known without a search. Until the merge each unit
has its ids in a note of its own, a JSON value a line.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import xxhash

from mamba_dist.data.durable import quick_hash, sync_file, sync_folder, unique_sibling
from mamba_dist.errors import ChangedPartError, DataError

DOCUMENT_IDS_NAME = "document_ids.arrow"
BATCH_ROWS = 1 << 14
_SCHEMA = pa.schema([pa.field("id", pa.string())])


class IdNote:
    """The ids of one unit's documents, as they come; a file only once it is committed."""

    def __init__(self, folder: Path, unit: int) -> None:
        self._final = _note_path(folder, unit)
        self._staged = unique_sibling(self._final)
        self._stream = self._staged.open("wb")
        self._hash = xxhash.xxh3_64()

    def add(self, source_id: str | None) -> None:
        """Notes the next document's id."""
        line = json.dumps(source_id).encode() + b"\n"
        self._stream.write(line)
        self._hash.update(line)

    def commit(self) -> str:
        """Makes the note durable; its xxh3, to be journalled."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._staged.replace(self._final)
        sync_folder(self._final.parent)
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Removes what was not committed."""
        self._staged.unlink(missing_ok=True)
        # On a full disk, closing tries to write the rest once more.
        with contextlib.suppress(OSError):
            self._stream.close()


def _note_path(folder: Path, unit: int) -> Path:
    return folder / f"unit-{unit:08d}.ids"


def write_document_ids(
    folder: Path, parts: Path, notes: Sequence[tuple[int, str | None]], *, id_field: str
) -> None:
    """Writes the file into `folder` from the notes in `parts`, each a unit and its xxh3.

    Raises:
        ChangedPartError: a note changed since it was journalled.
        DataError: no document has an id.
    """
    path = folder / DOCUMENT_IDS_NAME
    ids = _noted(parts, notes)
    has_any = False
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while batch := list(islice(ids, BATCH_ROWS)):
            has_any = has_any or any(found is not None for found in batch)
            writer.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=_SCHEMA))
    sync_file(path)
    if not has_any:
        raise DataError(
            f"no document has an id (text or a whole number) in the field {id_field!r}; give "
            "another --id-field, or none, and --overwrite"
        )


def _noted(parts: Path, notes: Iterable[tuple[int, str | None]]) -> Iterator[str | None]:
    for unit, xxh3 in notes:
        path = _note_path(parts, unit)
        if not path.is_file() or quick_hash(path) != xxh3:
            raise ChangedPartError(path, unit)
        with path.open("rb") as lines:
            yield from map(json.loads, lines)


def find_document_id(folder: Path, doc_id: int) -> str | None:
    """The id in its source of a document of a data set that keeps them; None if it has none.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / DOCUMENT_IDS_NAME
    try:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(doc_id // BATCH_ROWS)
            # A damaged offset leads out of the memory of the batch, and ends the process there.
            batch.validate(full=True)
            found: str | None = batch.column("id")[doc_id % BATCH_ROWS].as_py()
            return found
    except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}); restore it, see "
            f"`python tools/verify_shards.py {folder}`"
        ) from error
