"""index.npy as a file, written whole, mapped and never read whole; its format: shard_index.py."""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mamba_dist.data.shard_index import (
    BATCH_COLUMNS,
    INDEX_NAME,
    SHARD_COLUMNS,
    SPLITS,
    ShardIndex,
    SplitTable,
)
from mamba_dist.errors import DataError

_NPY_MAGIC: Final = b"\x93NUMPY\x01\x00"
_HEADER_BYTES: Final = 128


def index_bytes(index: ShardIndex, fingerprint: str) -> bytes:
    """The content of index.npy in the data set of a fingerprint.

    Raises:
        DataError: the index was read from a file, and is damaged there.
    """
    columns = [column for split in SPLITS for column in index.split(split).sealed(fingerprint)]
    numbers = np.concatenate(columns).astype("<u8")
    return _header(len(numbers)) + numbers.tobytes()


def _header(count: int) -> bytes:
    """The head of a .npy file of so many uint64, version 1.0 of its format, always the same."""
    described = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({count},), }}"
    padded = described.ljust(_HEADER_BYTES - len(_NPY_MAGIC) - 3) + "\n"
    return _NPY_MAGIC + struct.pack("<H", len(padded)) + padded.encode()


def map_index(
    folder: Path, counts: Sequence[tuple[int, int]], *, fingerprint: str, sha256: str
) -> ShardIndex:
    """The index of a data set folder; `counts` are the shards and batches of each split.

    Raises:
        DataError: it is missing, or not of that size.
    """
    path = folder / INDEX_NAME
    sizes = [
        (SHARD_COLUMNS * (shards + 1), BATCH_COLUMNS * (batches + 1)) for shards, batches in counts
    ]
    try:
        numbers = _map_numbers(path, sum(map(sum, sizes)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; restore it or tokenize again with --overwrite"
        ) from error
    tables, at = [], 0
    for split, (in_shards, in_batches) in zip(SPLITS, sizes, strict=True):
        shards = numbers[at : at + in_shards].reshape(SHARD_COLUMNS, -1)
        at += in_shards
        batches = numbers[at : at + in_batches].reshape(BATCH_COLUMNS, -1)
        at += in_batches
        tables.append(SplitTable(split, shards, batches, fingerprint=fingerprint, name=str(path)))
    return ShardIndex(tables, sha256=sha256)


def _map_numbers(path: Path, count: int) -> npt.NDArray[Any]:
    expected = _HEADER_BYTES + 8 * count
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"it has {size} bytes, by the manifest {expected}")
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # A search jumps about: reading ahead would pull in a hundred kilobytes at each step.
    mapped.madvise(mmap.MADV_RANDOM)
    if mapped[:_HEADER_BYTES] != _header(count):
        raise ValueError("it does not begin as the manifest says")
    return np.frombuffer(mapped, dtype="<u8", offset=_HEADER_BYTES)
