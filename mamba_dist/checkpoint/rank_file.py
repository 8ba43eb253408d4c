"""What one rank puts into a checkpoint: one file of tensors, and until the commit a record of it.

The file is a safetensors file with the keys `<parameter>|<kind>`. It is written front to back, each
byte hashed on the way, from wherever the state is: nothing but a block is copied.

A disk that is slow can be told from one that does not answer: `wrote` is called as it goes on.
"""

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mamba_dist.checkpoint.layout import rank_file
from mamba_dist.checkpoint.manifest import FileRecord, FragmentRecord, RankRecord
from mamba_dist.checkpoint.staged import rank_record_path
from mamba_dist.engine.base import STATE_KINDS, Fragment, StateKind
from mamba_dist.errors import CheckpointError

_ITEM_BYTES: Final = 4
_BLOCK_BYTES: Final = 8 << 20
# A block that is smaller is hashed sooner than another thread is woken.
_WORTH_A_THREAD_BYTES: Final = 1 << 20
# The disk begins with what was written when so much has come together, not at the fsync.
_STARTED_BYTES: Final = 32 << 20
# linux/fs.h: all that is written of a range is on the disk afterwards, what the file needs beside
# its data is not.
_SYNC_FILE_RANGE_WRITE_AND_WAIT: Final = 1 | 2 | 4
_sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_HEADER_ALIGNMENT: Final = 8


def _never() -> bool:
    return False


def _untold() -> None:
    return None


def write_rank(
    staging: Path,
    rank: int,
    fragments: Iterable[Fragment],
    *,
    beside: bool = False,
    abandoned: Callable[[], bool] = _never,
    wrote: Callable[[], None] = _untold,
) -> None:
    """Writes the rank's file and its record into the staging folder, and forces both to the disk.

    Args:
        beside: training goes on meanwhile; one thread does all, so that one free core is enough.
        abandoned: asked before each block whether to give up.
        wrote: called after each block that the file, and each stretch that the disk has taken.

    Raises:
        OSError: they could not be written.
        CheckpointError: it was abandoned.
    """
    listed = list(fragments)
    name = rank_file(rank)
    file, hashes = write_tensors(
        staging / name, listed, beside=beside, abandoned=abandoned, wrote=wrote
    )
    records = [
        FragmentRecord(
            name=fragment.name,
            file=name,
            start=fragment.start,
            numel=fragment.master.numel(),
            **{f"{kind}_sha256": hashes[tensor_key(fragment.name, kind)] for kind in STATE_KINDS},
        )
        for fragment in listed
    ]
    shapes = {fragment.name: list(fragment.shape) for fragment in listed}
    record = RankRecord(file=file, shapes=shapes, fragments=records)
    write_synced(rank_record_path(staging, rank), record.model_dump_json())


def write_tensors(
    path: Path,
    fragments: Sequence[Fragment],
    *,
    beside: bool,
    abandoned: Callable[[], bool],
    wrote: Callable[[], None],
) -> tuple[FileRecord, dict[str, str]]:
    """The record of the file that is now on the disk, and the SHA-256 of each tensor by its key.

    Raises:
        OSError: it could not be written.
        CheckpointError: it was abandoned.
    """
    tensors = {
        tensor_key(fragment.name, kind): fragment.tensor(kind)
        for fragment in fragments
        for kind in STATE_KINDS
    }
    header = _header(tensors)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        written = _Written(file, None if beside else hashing, wrote)
        header_hash = written.append([memoryview(header)])
        hashes = {}
        for key, tensor in tensors.items():
            hashes[key] = written.append(_blocks(tensor, abandoned))
        written.sync()
    record = FileRecord(name=path.name, size_bytes=written.size, header_sha256=header_hash)
    return record, hashes


def tensor_key(name: str, kind: StateKind) -> str:
    """Name of a parameter's state in a rank's file."""
    return f"{name}|{kind}"


def write_synced(path: Path, text: str) -> None:
    """Writes a file and forces it to the disk."""
    path.write_text(text, encoding="utf-8")
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Written:
    """A file that grows, and is hashed while it does, by another thread if there is one."""

    def __init__(
        self, file: FileIO, hashing: ThreadPoolExecutor | None, wrote: Callable[[], None]
    ) -> None:
        self.size = 0
        self._file = file
        self._hashing = hashing
        self._wrote = wrote
        self._started = 0

    def append(self, blocks: Iterable[memoryview]) -> str:
        """The SHA-256 of these blocks, which are now the end of the file."""
        digest = hashlib.sha256()
        for block in blocks:
            if self._hashing is None or len(block) < _WORTH_A_THREAD_BYTES:
                digest.update(block)
                self._write(block)
            else:
                hashed = self._hashing.submit(digest.update, block)
                self._write(block)
                hashed.result()
        return digest.hexdigest()

    def sync(self) -> None:
        """Forces the file to the disk."""
        # Memory may have taken all of it long before the disk, of which fsync alone says nothing.
        for start in range(0, self.size, _STARTED_BYTES):
            _sync_stretch(self._file.fileno(), start)
            self._wrote()
        os.fsync(self._file.fileno())

    def _write(self, block: memoryview) -> None:
        while block:
            count = self._file.write(block)
            self.size += count
            block = block[count:]
            self._wrote()
        if self.size - self._started >= _STARTED_BYTES:
            # On pages that nobody has written back yet, this is what starts it.
            os.posix_fadvise(
                self._file.fileno(),
                self._started,
                self.size - self._started,
                os.POSIX_FADV_DONTNEED,
            )
            self._started = self.size


def _sync_stretch(descriptor: int, start: int) -> None:
    """Returns when a stretch of a file has been written to the disk."""
    if _sync_file_range(descriptor, start, _STARTED_BYTES, _SYNC_FILE_RANGE_WRITE_AND_WAIT) != 0:
        number = ctypes.get_errno()
        # Such a kernel (gVisor) does it all in the fsync. Another error is not told a second time.
        if number != errno.ENOSYS:
            raise OSError(number, os.strerror(number))


def _header(tensors: dict[str, Tensor]) -> bytes:
    places, position = {}, 0
    for key, tensor in tensors.items():
        end = position + _ITEM_BYTES * tensor.numel()
        places[key] = {
            "dtype": "F32",
            "shape": [tensor.numel()],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: Tensor, abandoned: Callable[[], bool]) -> Iterator[memoryview]:
    """The bytes of an fp32 tensor, (numel,), in its order."""
    for block in torch.split(tensor.detach(), _BLOCK_BYTES // _ITEM_BYTES):
        if abandoned():
            raise CheckpointError("given up, since another rank could not write")
        if block.numel():
            yield block.cpu().contiguous().numpy().data.cast("B")
