"""The bytes of an input file in blocks of bounded size, decompressed, and hashed on the way."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import xxhash
import zstandard

from mamba_dist.data.preparation.sources import Compression, InputFile
from mamba_dist.errors import DataError

BLOCK_BYTES = 1 << 16
# So few, since they may be 16 MiB of zeros, compressed by zstd.
_FED_BYTES = 1 << 9
# What zstd takes unless told otherwise (--long=27); a worker has memory for it.
_MOST_WINDOW_BYTES = 1 << 27
_FRAME_HEADER_BYTES = 18  # at most
# Beside its window.
_XZ_BYTES = 1 << 20
_XZ_TOO_LARGE = "Memory usage limit exceeded"
# Tapes and dd fill up the last block of a gzip file; the xz format has padding of its own.
_PADDED: frozenset[Compression] = frozenset({"gzip", "xz"})
_GZIP_WINDOW_BITS = 31  # zlib: 15 bits of window, +16 for the gzip header


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


class _WindowError(Exception):
    """A zstd frame needs this many bytes of memory."""


class _ZstdFrame:
    """One zstd frame, which tells why its window is too large."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES).decompressobj()
        self._header = b""

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, /) -> bytes:
        if len(self._header) < _FRAME_HEADER_BYTES:
            self._header += data[:_FRAME_HEADER_BYTES]
        try:
            return self._frame.decompress(data)
        except zstandard.ZstdError as error:
            try:
                window = zstandard.get_frame_parameters(self._header).window_size
            except zstandard.ZstdError:
                raise error from None  # it is no frame
            if window <= _MOST_WINDOW_BYTES:
                raise
            raise _WindowError(window) from error


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    "gzip": lambda: zlib.decompressobj(_GZIP_WINDOW_BITS),
    "zstd": _ZstdFrame,
    "xz": lambda: lzma.LZMADecompressor(memlimit=_MOST_WINDOW_BYTES + _XZ_BYTES),
}
DECOMPRESSION_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError)


class FileBlocks:
    """One pass over a file, from a byte of the file on (0 if it is compressed).

    Iterating raises DataError for a compressed stream that is cut short, DECOMPRESSION_ERRORS for
    one that is damaged, OSError for what cannot be read.
    """

    def __init__(self, file: InputFile, start_bytes: int = 0) -> None:
        self._file = file
        self._start_bytes = start_bytes
        self._hash = xxhash.xxh3_64()
        self._has_ended = False

    @property
    def xxh3(self) -> str | None:
        """The xxh3-64 of the file as it lies on disk; None unless all of it was read."""
        return self._hash.hexdigest() if self._has_ended and not self._start_bytes else None

    def __iter__(self) -> Iterator[bytes]:
        if self._file.compression == "none":
            return self._raw()
        return self._decompressed(self._file.compression)

    def _raw(self) -> Iterator[bytes]:
        # Unbuffered, since the blocks are buffers enough.
        with Path(self._file.path).open("rb", buffering=0) as stream:
            stream.seek(self._start_bytes)
            while block := stream.read(BLOCK_BYTES):
                self._hash.update(block)
                yield block
        self._has_ended = True

    def _decompressed(self, compression: Compression) -> Iterator[bytes]:
        decompressor = _DECOMPRESSORS[compression]()
        was_fed = False
        ready: list[bytes] = []
        ready_bytes = 0
        for block in self._raw():
            for start in range(0, len(block), _FED_BYTES):
                fed = block[start : start + _FED_BYTES]
                while fed:
                    if decompressor.eof:
                        fed = fed.lstrip(b"\0") if compression in _PADDED else fed
                        if not fed:
                            break
                        decompressor = _DECOMPRESSORS[compression]()
                    was_fed = True
                    ready.append(self._fed(decompressor, fed))
                    ready_bytes += len(ready[-1])
                    fed = decompressor.unused_data if decompressor.eof else b""
                if ready_bytes >= BLOCK_BYTES:
                    yield b"".join(ready)
                    ready, ready_bytes = [], 0
        if ready_bytes:
            yield b"".join(ready)
        # zstandard's own stream reader ends quietly on a stream that was cut short.
        if was_fed and not decompressor.eof:
            raise DataError(
                f"{self._file.path} is cut short: its {compression} stream does not end; replace "
                "or --exclude it"
            )

    def _fed(self, decompressor: _Decompressor, data: bytes) -> bytes:
        try:
            return decompressor.decompress(data)
        except _WindowError as error:
            raise DataError(
                f"{self._file.path} needs a window of {error.args[0]:,} bytes to decompress, more "
                f"than {_MOST_WINDOW_BYTES:,}; recompress it by zstd --long=27 or less"
            ) from error
        except lzma.LZMAError as error:
            if str(error) != _XZ_TOO_LARGE:
                raise
            raise DataError(
                f"{self._file.path} needs a dictionary of more than {_MOST_WINDOW_BYTES:,} bytes "
                "to decompress; recompress it by xz -9 or less"
            ) from error
