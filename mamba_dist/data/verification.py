"""Checking a data set against its manifest: every problem, by file and byte, not only the first.

A shard is read once, front to back, one record batch in memory at a time, by plain reads: a bad
sector under a memory map would end the process by a signal. Which hash covers which bytes:

    [head | batch 0][batch 1] … [batch n-1][footer]     BatchRecord.xxh3 for each [batch]
    [                   whole file                ]     ShardRecord.xxh3 and .sha256
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import xxhash

from mamba_dist.data.batch_check import batch_faults
from mamba_dist.data.document_ids import DOCUMENT_IDS_NAME
from mamba_dist.data.durable import hash_file
from mamba_dist.data.manifest import BAD_DOCUMENTS_NAME, INPUTS_NAME, MANIFEST_NAME, Manifest
from mamba_dist.data.shard import batch_end, header_faults
from mamba_dist.data.shard_index import INDEX_NAME, BatchRecord, ShardRecord
from mamba_dist.errors import DataError

Depth = Literal["quick", "xxh3", "sha256"]
"""quick: sizes and footers; xxh3: every byte; sha256: also that hash, part of the fingerprint."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file; `start` and `stop` are bytes from its beginning."""

    file: str
    fault: str
    batch: int | None = None
    start: int | None = None
    stop: int | None = None

    def __str__(self) -> str:
        where = self.file
        if self.batch is not None:
            where += f", batch {self.batch}"
        if self.start is not None:
            end = "" if self.stop is None else f" to {self.stop}"
            where += f", {'byte' if self.stop is None else 'bytes'} {self.start}{end}"
        return f"{where}: {self.fault}"


def dataset_problems(
    folder: Path, manifest: Manifest, *, depth: Depth, advance: Callable[[int], None]
) -> Iterator[Problem]:
    """Everything wrong with the files of a data set; `advance` hears of shard bytes as they are
    read."""
    if (fault := _index_fault(folder, manifest)) is not None:
        # Nothing that it says of the shards can be relied on.
        yield Problem(INDEX_NAME, fault)
        return
    yield from _manifest_problems(manifest)
    yield from _companion_problems(folder, manifest, depth=depth)
    known = {shard.file for shard in manifest.shards}
    if manifest.inputs.ids_sha256 is not None:
        known.add(DOCUMENT_IDS_NAME)
    for path in sorted(folder.glob("*.arrow")):
        if path.name not in known:
            yield Problem(path.name, "is an extra shard that the manifest does not name; remove it")
    for shard in manifest.shards:
        yield from shard_problems(folder, shard, manifest, depth=depth, advance=advance)


def shard_problems(
    folder: Path,
    record: ShardRecord,
    manifest: Manifest,
    *,
    depth: Depth,
    advance: Callable[[int], None],
) -> Iterator[Problem]:
    """Everything wrong with one shard of `folder`."""
    path = folder / record.file
    try:
        with path.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            yield from _size_problems(record, size, manifest)
            if size == record.bytes:
                with pa.OSFile(str(path)) as file:
                    for fault in header_faults(file, record, manifest):
                        yield Problem(record.file, fault)
            if depth != "quick":
                yield from _Scan(path, record, manifest, depth, advance).problems(stream, size)
    except FileNotFoundError:
        yield Problem(record.file, "is missing")
    except OSError as error:
        yield Problem(record.file, f"cannot be read: {error.strerror or error}; check the disk")


def _index_fault(folder: Path, manifest: Manifest) -> str | None:
    expected = manifest.index.sha256
    if expected is None:
        return None
    found = hash_file(folder / INDEX_NAME).sha256
    return None if found == expected else f"was changed: its sha256 is {found}, not {expected}"


def _manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """What the manifest says against itself."""
    if (computed := manifest.computed_fingerprint()) != manifest.fingerprint:
        yield Problem(
            MANIFEST_NAME,
            f"its fingerprint is {manifest.fingerprint}, its shards give {computed}",
        )
    documents = sum(shard.documents for shard in manifest.shards)
    left_out = manifest.duplicates.documents if manifest.duplicates is not None else 0
    if documents != manifest.inputs.documents - left_out:
        yield Problem(
            MANIFEST_NAME,
            f"its shards hold {documents} documents, its inputs {manifest.inputs.documents}"
            + f", {left_out} of them duplicates" * bool(left_out),
        )
    for shard in manifest.shards:
        for index in _misplaced(shard, manifest.dtype):
            yield Problem(
                MANIFEST_NAME,
                f"it places batch {index} of {shard.file} outside the file or over the one before",
            )


def _misplaced(shard: ShardRecord, dtype: str) -> Iterator[int]:
    """The batches that cannot lie where the manifest says."""
    end = 0
    for index, batch in enumerate(shard.batches):
        counts = min(batch.documents, batch.tokens)
        first = min(batch.offsets_at, batch.values_at, batch.doc_ids_at)
        if counts < 0 or first < end or batch_end(batch, dtype) > shard.bytes:
            yield index
            return
        end = batch_end(batch, dtype)


def _companion_problems(folder: Path, manifest: Manifest, *, depth: Depth) -> Iterator[Problem]:
    expected = {
        manifest.tokenizer.file: manifest.tokenizer.sha256,
        INPUTS_NAME: manifest.inputs.sha256,
        BAD_DOCUMENTS_NAME: None,
    }
    if manifest.inputs.ids_sha256 is not None:
        expected[DOCUMENT_IDS_NAME] = manifest.inputs.ids_sha256
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            yield Problem(name, "is missing")
        elif sha256 is not None and depth != "quick":
            try:
                found = hash_file(folder / name).sha256
            except DataError as error:
                yield Problem(name, str(error))
                continue
            if found != sha256:
                yield Problem(name, f"was changed: its sha256 is {found}, not {sha256}")


def _size_problems(record: ShardRecord, size: int, manifest: Manifest) -> Iterator[Problem]:
    if size > record.bytes:
        yield Problem(
            record.file,
            f"has {size} bytes, the manifest says {record.bytes}: it has grown",
            start=record.bytes,
            stop=size,
        )
    if size < record.bytes:
        lost = [
            index
            for index, batch in enumerate(record.batches)
            if batch_end(batch, manifest.dtype) > size
        ]
        what = f"batches {lost[0]} to {lost[-1]} are" if lost else "the footer is"
        yield Problem(
            record.file,
            f"is truncated: it has {size} bytes, the manifest says {record.bytes}; {what} cut off",
            start=size,
        )


class _Scan:
    """One pass over a shard. Faults of hashes wait for its end, when it is known whom to believe:
    the manifest's xxh3 is covered by nothing, its sha256 by the fingerprint."""

    def __init__(
        self,
        path: Path,
        record: ShardRecord,
        manifest: Manifest,
        depth: Depth,
        advance: Callable[[int], None],
    ) -> None:
        self._path = path
        self._record = record
        self._manifest = manifest
        self._advance = advance
        self._whole, self._stretch = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._strong = hashlib.sha256() if depth == "sha256" else None
        self._at = 0
        self._buffer = bytearray(_BLOCK_BYTES)
        self._suspects: list[Problem] = []

    def problems(self, stream: BinaryIO, size: int) -> Iterator[Problem]:
        """What is wrong with the first `record.bytes` of an open shard of `size` bytes."""
        record = self._record
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        readable = not any(_misplaced(record, self._manifest.dtype))
        previous = -1
        for index, batch in enumerate(record.batches if readable else ()):
            end = batch_end(batch, self._manifest.dtype)
            if end > size:
                yield from self._suspects
                return
            start = self._at
            region = self._read_batch(stream, end - start)
            yield from self._compare_batch(index, batch, region, start=start, previous=previous)
            if batch.documents:
                at = batch.doc_ids_at - start
                last = region[at + 8 * (batch.documents - 1) : at + 8 * batch.documents]
                previous = int.from_bytes(last, "little")
        if size < record.bytes:
            yield from self._suspects
            return
        footer_at = self._at
        while self._at < record.bytes:
            self._read(stream, min(_BLOCK_BYTES, record.bytes - self._at), into=0)
        yield from self._verdict(footer_at if readable else None)

    def _read_batch(self, stream: BinaryIO, length: int) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = bytearray(length + length // 8)  # batches differ a little in size
        self._stretch.reset()
        for into in range(0, length, _BLOCK_BYTES):
            self._read(stream, min(_BLOCK_BYTES, length - into), into=into)
        return memoryview(self._buffer)[:length]

    def _read(self, stream: BinaryIO, length: int, *, into: int) -> None:
        view = memoryview(self._buffer)[into : into + length]
        done = 0
        while done < length:
            count = stream.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(None, f"it ends at byte {self._at + done}, it shrank meanwhile")
            done += count
        # Hashed in blocks, while they are in the processor's cache.
        self._whole.update(view)
        self._stretch.update(view)
        if self._strong is not None:
            self._strong.update(view)
        self._at += length
        self._advance(length)

    def _compare_batch(
        self, index: int, batch: BatchRecord, region: memoryview, *, start: int, previous: int
    ) -> Iterator[Problem]:
        file, stop = self._record.file, start + len(region)
        if batch.xxh3 is not None and (found := self._stretch.hexdigest()) != batch.xxh3:
            fault = f"is damaged: its xxh3 is {found}, the manifest says {batch.xxh3}"
            self._suspects.append(Problem(file, fault, index, start, stop))
        for at, fault in batch_faults(
            region, batch, self._manifest, start=start, previous_doc_id=previous
        ):
            yield Problem(file, fault, index, at)

    def _verdict(self, footer_at: int | None) -> Iterator[Problem]:
        """The faults of hashes, laid at the door of the shard or of the manifest."""
        record, found = self._record, self._whole.hexdigest()
        differs = found != record.xxh3
        if differs and not self._suspects:
            self._suspects.append(self._unplaced(found, footer_at))
        strong = self._strong.hexdigest() if self._strong is not None else None
        if self._suspects and strong is None:
            strong = self._sha256_again()
        if strong is not None and strong != record.sha256:
            yield from self._suspects or [
                Problem(record.file, f"its sha256 is {strong}, the manifest says {record.sha256}")
            ]
        elif self._suspects:
            yield Problem(
                MANIFEST_NAME,
                f"its xxh3 of {record.file} or of one of its batches is wrong: the file has the "
                "sha256 that the fingerprint vouches for",
            )

    def _unplaced(self, found: str, footer_at: int | None) -> Problem:
        record = self._record
        fault = f"is damaged: its xxh3 is {found}, the manifest says {record.xxh3}"
        if footer_at is None or any(batch.xxh3 is None for batch in record.batches):
            return Problem(
                record.file,
                f"{fault}; where cannot be told, since the manifest holds no hashes of its batches",
            )
        return Problem(record.file, f"{fault}; its footer", start=footer_at, stop=record.bytes)

    def _sha256_again(self) -> str:
        strong, left = hashlib.sha256(), self._record.bytes
        with self._path.open("rb") as stream:
            while left and (block := stream.read(min(_BLOCK_BYTES, left))):
                strong.update(block)
                left -= len(block)
        return strong.hexdigest()
