"""Standard input as an input file: kept on disk first, since workers read ranges of it and an
interrupted run reads it again.

It lies in the output folder as `.stdin` until the data set is finished. Piping the same bytes again
finds it and continues; so does the same command with nothing in the pipe, or at a terminal. What no
unfinished data set is made of, since the build was refused, gives way to other input.
"""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

import xxhash

from mamba_dist.data.durable import exclusive_lock, quick_hash, sync_folder
from mamba_dist.data.preparation.sources import Compression, InputFile
from mamba_dist.data.preparation.staging import unfinished_inputs
from mamba_dist.errors import DataError

NAME = "stdin"
_KEPT = ".stdin"
_BLOCK_BYTES = 1 << 20
_MAGICS: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
}


def keep_standard_input(
    stream: BinaryIO, output: Path, *, content: Literal["jsonl", "text"], overwrite: bool
) -> InputFile:
    """All that comes out of `stream`, plain or compressed, as a file in the folder `output`.

    Raises:
        DataError: nothing came, or other than an unfinished build began with (and not `overwrite`),
            or it cannot be written.
    """
    kept = output / _KEPT
    blocks = _blocks(stream)
    first = next(blocks, b"")
    if not first and not kept.exists():
        where = "a terminal" if stream.isatty() else "empty"
        raise DataError(
            f"standard input is {where}; pipe text into it, as in `zcat *.gz | python "
            "data_prep/tokenize.py -`"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(output):
            if first:
                _keep(chain([first], blocks), kept, overwrite=overwrite)
            return _described(kept, content)
    except OSError as error:
        raise DataError(
            f"cannot keep standard input in {kept}: {error.strerror or error}; free some space, or "
            "give an --output on another disk"
        ) from error


def discard_standard_input(output: Path) -> None:
    """Removes what was kept, unless an unfinished data set is made of it, and what a killed process
    left half-written. To be called under the folder's lock.
    """
    if not _is_needed(output):
        (output / _KEPT).unlink(missing_ok=True)
    # Of a process that was killed while input came in.
    _staged(output / _KEPT).unlink(missing_ok=True)


def _staged(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.partial")


def _is_needed(output: Path) -> bool:
    return NAME in unfinished_inputs(output)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    if not stream.isatty():
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _keep(blocks: Iterator[bytes], kept: Path, *, overwrite: bool) -> None:
    staged = _staged(kept)
    hashed = xxhash.xxh3_64()
    try:
        with staged.open("wb") as target:
            for block in blocks:
                hashed.update(block)
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if kept.exists() and quick_hash(kept) == hashed.hexdigest():
            return  # its time of change, by which the plan of a build knows it, stays
        if kept.exists() and not overwrite and _is_needed(kept.parent):
            raise DataError(
                f"{kept.parent} holds an unfinished data set made of other standard input; pipe "
                "that in again to finish it, or add --overwrite to start over"
            )
        staged.replace(kept)
        sync_folder(kept.parent)
    finally:
        staged.unlink(missing_ok=True)


def _described(kept: Path, content: Literal["jsonl", "text"]) -> InputFile:
    with kept.open("rb") as stream:
        head = stream.read(max(map(len, _MAGICS)))
    packed = (name for magic, name in _MAGICS.items() if head.startswith(magic))
    status = kept.stat()
    return InputFile(
        str(kept), NAME, status.st_size, status.st_mtime_ns, content, next(packed, "none")
    )
