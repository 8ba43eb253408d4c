"""Files that are whole or absent after a crash, their hashes, and the lock on an output folder."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from mamba_dist.errors import DataError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileHashes:
    """Size and hashes of one file; xxh3 is quick (64 bit), sha256 is for identity."""

    bytes: int
    xxh3: str
    sha256: str


class RunningHashes:
    """The hashes of bytes as they pass by."""

    def __init__(self) -> None:
        self._quick, self._strong, self.bytes = xxhash.xxh3_64(), hashlib.sha256(), 0

    def update(self, block: bytes) -> None:
        """Takes the next bytes."""
        self._quick.update(block)
        self._strong.update(block)
        self.bytes += len(block)

    def result(self) -> FileHashes:
        """Of all bytes so far."""
        return FileHashes(self.bytes, self._quick.hexdigest(), self._strong.hexdigest())


def hash_file(path: Path) -> FileHashes:
    """Size, xxh3-64 and sha256 of a file, read once.

    Raises:
        DataError: the file cannot be read.
    """
    hashes = RunningHashes()
    for block in _blocks(path):
        hashes.update(block)
    return hashes.result()


def quick_hash(path: Path) -> str:
    """The xxh3-64 of a file as 16 hex digits.

    Raises:
        DataError: the file cannot be read.
    """
    quick = xxhash.xxh3_64()
    for block in _blocks(path):
        quick.update(block)
    return quick.hexdigest()


def stretch_hashes(path: Path, ends: Sequence[int]) -> list[str]:
    """The xxh3-64 of a file's bytes up to ends[0], from there to ends[1], and so on.

    Raises:
        DataError: the file cannot be read.
    """
    hashes: list[str] = []
    current, at = xxhash.xxh3_64(), 0
    for block in _blocks(path):
        view = memoryview(block)
        while len(hashes) < len(ends) and ends[len(hashes)] <= at + len(view):
            stop = ends[len(hashes)] - at
            current.update(view[:stop])
            hashes.append(current.hexdigest())
            current, view, at = xxhash.xxh3_64(), view[stop:], at + stop
        current.update(view)
        at += len(view)
    return hashes


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the file") from error


def sync_file(path: Path) -> None:
    """Forces a written file onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Forces the names in a folder onto the disk, so that a rename survives a power cut."""
    sync_file(path)


def unique_sibling(path: Path) -> Path:
    """A name beside `path` for what is to become it, that no other process on any machine takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file so that, after a crash at any moment, it is whole, or as it was before."""
    staged = unique_sibling(path)
    with staged.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(path)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes) -> None:
    """As `write_durably`, unless the file is there with that content: others may be reading it."""
    if not path.is_file() or path.read_bytes() != data:
        write_durably(path, data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """An empty file that becomes `path`, whole, by one rename when the block ends without error.

    What a killed process left of it is taken over by the next one.

    Raises:
        DataError: another process is making it.
    """
    staged = path.with_name(f".{path.name}.partial")
    descriptor = _lock(
        staged,
        fcntl.LOCK_EX | fcntl.LOCK_NB,
        busy=f"another process is making {path}; wait for it to end",
    )
    with os.fdopen(descriptor, "r+b") as stream:
        try:
            stream.truncate(0)
            yield stream
            stream.flush()
            os.fsync(descriptor)
            staged.replace(path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that becomes `path`, whole, by one rename when the block ends without error.

    What a killed process left of it is cleared away by the next one.

    Raises:
        DataError: `path` exists and is not an empty folder, or another process is making it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} exists already and is left as it is; give a new folder")
    final = Path(os.path.abspath(path))
    staging = final.with_name(f".{final.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(staging):
            files = staging / "files"
            try:
                if files.exists():
                    shutil.rmtree(files)
                files.mkdir()
                yield files
                sync_folder(files)
                files.replace(final)
                sync_folder(final.parent)
            finally:
                shutil.rmtree(files, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            staging.rmdir()


@contextlib.contextmanager
def exclusive_lock(
    folder: Path, *, name: str = ".lock", wait: bool = False, busy: str | None = None
) -> Iterator[None]:
    """Holds the folder for this process alone; the kernel releases it however the process ends.

    On a shared disk it holds for all machines, if the file system passes locks on. `busy` is said
    while another process holds it.

    Raises:
        DataError: another process holds it (and not `wait`), or the disk has no locks.
    """
    path = folder / name
    operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    descriptor = _lock(path, operation, busy=busy or _is_written(folder))
    try:
        yield
    finally:
        # Removed while still held, so that nobody can lock a file that is about to vanish
        # unnoticed.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Holds the folder together with others who share it, against `exclusive_lock`.

    Raises:
        DataError: a process holds it for itself, or the disk has no locks.
    """
    operation = fcntl.LOCK_SH | fcntl.LOCK_NB
    descriptor = _lock(folder / ".lock", operation, busy=_is_written(folder))
    try:
        yield
    finally:
        os.close(descriptor)  # the file stays: others may hold it


def _is_written(folder: Path) -> str:
    return f"another process is writing into {folder}; wait for it to end, or give another --output"


def _lock(path: Path, operation: int, *, busy: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(busy) from error
        except OSError as error:
            os.close(descriptor)
            raise DataError(
                f"the file system of {path.parent} cannot lock files ({error.strerror}); mount it "
                "with locks (Lustre: -o flock), or give an --output elsewhere"
            ) from error
        if _is_still_named(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder removed it between our open and our lock


def _is_still_named(descriptor: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return named.st_ino == os.fstat(descriptor).st_ino
