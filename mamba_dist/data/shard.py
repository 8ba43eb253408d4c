"""A shard: one Arrow IPC file, and reading it through our own memory map.

    tokens: large_list<uint16|uint32>   a row is a document, its EOS included
    doc_id: uint64                      number of the document in the corpus, from 0

Buffers are uncompressed, so the values of a batch are one flat array inside the file. The manifest
says where; reading is a numpy view at that offset. pyarrow's `get_batch` on a memory map was
measured to pull in 356 of 405 MB at start, the map here 8 KB.
"""

import ctypes
import errno
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mamba_dist.data.manifest import MANIFEST_NAME, Manifest
from mamba_dist.data.shard_index import BatchRecord, ShardRecord
from mamba_dist.errors import DataError

_MAGIC = b"ARROW1"
_METADATA_PREFIX = "mamba_dist."
# A process of several data sets, two splits each, stays far below Linux's 65,530 maps.
_KEPT_READERS: Final = 512
_MADVISE: Final = ctypes.CDLL(None).madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 if every id below `vocab_size` fits, otherwise uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def shard_schema(metadata: dict[str, str], dtype: npt.DTypeLike) -> pa.Schema:
    """The Arrow schema of a shard with our metadata."""
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema(
        [
            pa.field("tokens", pa.large_list(item), nullable=False),
            pa.field("doc_id", pa.uint64(), nullable=False),
        ],
        metadata={_METADATA_PREFIX + key: value for key, value in metadata.items()},
    )


def shard_metadata(manifest: Manifest, split: str) -> dict[str, str]:
    """What the schema of every shard of a split says about itself."""
    return schema_metadata(
        split,
        dtype=manifest.dtype,
        tokenizer_sha256=manifest.tokenizer.sha256,
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
    )


def schema_metadata(
    split: str, *, dtype: str, tokenizer_sha256: str, vocab_size: int, eos_id: int
) -> dict[str, str]:
    """The same from its parts, for a writer that has no manifest yet."""
    return {
        "format_version": "1",
        "split": split,
        "dtype": dtype,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": str(vocab_size),
        "eos_id": str(eos_id),
    }


def check_size(path: Path, record: ShardRecord) -> None:
    """Nothing, if the shard is there and as long as the manifest says; reads only its directory
    entry.

    Raises:
        DataError: it is missing or its size differs.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} of the manifest is missing ({error.strerror}); restore it or tokenize "
            f"again"
        ) from error
    if size != record.bytes:
        what = "truncated" if size < record.bytes else "longer than it was"
        raise DataError(
            f"shard {path} is {what}: it has {size} bytes, the manifest says {record.bytes}; "
            f"restore it "
            "or tokenize again with --overwrite"
        )


class ShardReader:
    """Zero-copy arrays of one shard. Nothing is opened before the first array is asked for."""

    def __init__(
        self, path: Path, record: ShardRecord, manifest: Manifest, *, sequential: bool = False
    ) -> None:
        self.path = path
        self.record = record
        self._manifest = manifest
        self._dtype = np.dtype(manifest.dtype)
        # Windows are read in random order: reading ahead would only pull in what nobody wants.
        self._advice = mmap.MADV_SEQUENTIAL if sequential else mmap.MADV_RANDOM

    def tokens(self, batch: int) -> npt.NDArray[Any]:
        """(tokens,) ids of a batch, a view into the file."""
        record = self.record.batches[batch]
        return self._view(record.values_at, record.tokens, self._dtype)

    def offsets(self, batch: int) -> npt.NDArray[np.int64]:
        """(documents + 1,) where each document begins in `tokens(batch)`, and the end."""
        record = self.record.batches[batch]
        return self._view(record.offsets_at, record.documents + 1, np.dtype(np.int64))

    def doc_ids(self, batch: int) -> npt.NDArray[np.uint64]:
        """(documents,) number in the corpus of each document of a batch."""
        record = self.record.batches[batch]
        return self._view(record.doc_ids_at, record.documents, np.dtype(np.uint64))

    def _view(self, at: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        try:
            return np.frombuffer(self._map, dtype=dtype, count=count, offset=at)
        except ValueError as error:
            raise DataError(
                f"the manifest places {count} numbers at byte {at} of shard {self.path}, which has "
                f"{self.record.bytes}; restore the manifest or tokenize again with --overwrite"
            ) from error

    @cached_property
    def _map(self) -> pa.Buffer:
        check_size(self.path, self.record)
        mapped = _map_file(self.path, self._advice)
        for fault in header_faults(pa.BufferReader(mapped), self.record, self._manifest):
            raise DataError(
                f"shard {self.path} {fault}; restore it or tokenize again with --overwrite"
            )
        if self._manifest.index.sha256 is None:
            self._check_places(mapped)
        return mapped

    def _check_places(self, mapped: pa.Buffer) -> None:
        """Nothing, if the batches lie where a manifest of version 1 says, which no hash covers."""
        try:
            found = _located(mapped)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"shard {self.path} is damaged ({error}); restore it or tokenize again with "
                "--overwrite"
            ) from error
        for number, (batch, there) in enumerate(zip(self.record.batches, found, strict=True)):
            if replace(batch, xxh3=None) != there:
                raise DataError(
                    f"{self.path.parent / MANIFEST_NAME} places batch {number} of shard "
                    f"{self.path} where it does not lie; restore it or tokenize again with "
                    "--overwrite"
                )


def _map_file(path: Path, advice: int) -> pa.Buffer:
    """The file in memory, for as long as the buffer or a view of it lives; no descriptor is kept,
    as Python's own mmap does before 3.13.

    Raises:
        DataError: it cannot be opened or mapped.
    """
    try:
        with pa.memory_map(str(path)) as source:
            # Any buffer holds the whole map, and asking for a longer one would read all of it.
            beginning = source.read_buffer(1)
            mapped = pa.foreign_buffer(beginning.address, source.size(), base=beginning)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"shard {path} cannot be read: {error}{_limit_advice(error)}") from error
    # Advice may be refused (a kernel without it) and reading is right all the same.
    _MADVISE(mapped.address, mapped.size, advice)
    return mapped


def _limit_advice(error: Exception) -> str:
    # Arrow keeps the number of what it met for some calls only, the words for all.
    if os.strerror(errno.EMFILE) in str(error):
        return "; close some, or raise the limit (ulimit -n)"
    if os.strerror(errno.ENOMEM) in str(error):
        return (
            f"; a process keeps {_KEPT_READERS} shards of each split mapped: raise its limit of "
            "address space (ulimit -v) or the machine's of maps (sysctl vm.max_map_count)"
        )
    return ""


class SplitReaders:
    """The batches of one split by number, each with its shard's reader, made when asked for.

    Of more than 512 shards those asked for last are kept. A map is there as long as any view of it:
    what the caller keeps of batches, by number, stands in `views` and leaves it with the shard.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        split: str,
        *,
        views: MutableMapping[int, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._table = manifest.shards_of(split)
        self._readers: OrderedDict[int, tuple[ShardReader, range]] = OrderedDict()
        self._views = {} if views is None else views

    def __len__(self) -> int:
        return self._table.batches

    def __getitem__(self, batch: int) -> tuple[ShardReader, int]:
        """The reader of the shard that holds a batch, and the batch's place in it.

        Raises:
            DataError: the index is damaged there.
        """
        number, place = self._table.find_batch(batch)
        # Single steps that leave all whole, for a caller of several threads.
        kept = self._readers.pop(number, None) or self._opened(number, batch - place)
        self._readers[number] = kept
        while len(self._readers) > _KEPT_READERS:
            _, (_, batches) = self._readers.popitem(last=False)
            for gone in batches:
                self._views.pop(gone, None)
        return kept[0], place

    def _opened(self, shard: int, first_batch: int) -> tuple[ShardReader, range]:
        record = self._table[shard]
        reader = ShardReader(self._folder / record.file, record, self._manifest)
        return reader, range(first_batch, first_batch + len(record.batches))


def header_faults(file: pa.NativeFile, record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the ends of an open shard, as predicates; no batch is touched."""
    size = file.size()
    ends = file.read_at(len(_MAGIC), 0), file.read_at(len(_MAGIC), max(0, size - len(_MAGIC)))
    if ends != (_MAGIC, _MAGIC):
        yield f"is no Arrow file (it does not begin and end with {_MAGIC.decode()})"
        return
    try:
        reader = pa.ipc.open_file(file)
        found = {
            key.decode().removeprefix(_METADATA_PREFIX): value.decode()
            for key, value in (reader.schema.metadata or {}).items()
        }
        columns = _columns(reader.schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"has a damaged footer ({error})"
        return
    expected = {
        **shard_metadata(manifest, record.split),
        "batches": str(len(record.batches)),
        "columns": _columns(shard_schema({}, np.dtype(manifest.dtype))),
    }
    found |= {"batches": str(reader.num_record_batches), "columns": columns}
    for key, value in expected.items():
        if found.get(key) != value:
            yield (
                f"belongs to another data set: its {key} is {found.get(key)}, the manifest says "
                f"{value}"
            )


def _columns(schema: pa.Schema) -> str:
    return ", ".join(map(str, schema))


def batch_end(batch: BatchRecord, dtype: npt.DTypeLike) -> int:
    """Where the last buffer of a batch ends, in bytes from the beginning of the file."""
    return max(
        batch.offsets_at + 8 * (batch.documents + 1),
        batch.values_at + np.dtype(dtype).itemsize * batch.tokens,
        batch.doc_ids_at + 8 * batch.documents,
    )


def locate_buffers(path: Path) -> list[BatchRecord]:
    """The documents, tokens and buffer offsets of every batch of a finished shard."""
    with pa.memory_map(str(path)) as source:
        return _located(source.read_buffer())


def _located(whole: pa.Buffer) -> list[BatchRecord]:
    """The same of a shard in memory, of which a page for each batch is read."""
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    records = []
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        batch.validate()  # that its lengths are lengths
        _, offsets, _, values = batch.column(0).buffers()
        _, doc_ids = batch.column(1).buffers()
        records.append(
            BatchRecord(
                documents=batch.num_rows,
                tokens=len(batch.column(0).values),
                offsets_at=offsets.address - whole.address,
                values_at=values.address - whole.address,
                doc_ids_at=doc_ids.address - whole.address,
            )
        )
    return records
