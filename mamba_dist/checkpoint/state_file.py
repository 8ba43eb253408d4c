"""One rank's file of a checkpoint, read so that no byte is read twice and none goes unhashed.

It is a safetensors file: 8 bytes with the length of a header, the header in JSON with the place of
each tensor, then the tensors. It is read by plain reads: in a mapped file, what the disk cannot
give is a signal that ends the process.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from mamba_dist.checkpoint.faults import is_damage
from mamba_dist.checkpoint.manifest import FileRecord
from mamba_dist.errors import DamagedCheckpointError, UnreadableCheckpointError

_LENGTH_BYTES = 8
_ITEM_BYTES = 4
_BLOCK_BYTES = 1 << 22


class Stretch:
    """The bytes of one tensor, front to back, fp32."""

    def __init__(self, file: FileIO, numel: int) -> None:
        self.numel = numel
        """Elements that were not taken yet."""
        self._file = file
        self._digest = hashlib.sha256()

    def take(self, numel: int) -> Tensor:
        """The next elements, fewer at the end, (numel,) fp32.

        Raises:
            OSError: the file ends before them, or cannot be read.
        """
        taken = torch.empty(min(numel, self.numel), dtype=torch.float32)
        view = taken.numpy().data.cast("B") if taken.numel() else memoryview(b"")
        while view:
            count = self._file.readinto(view[:_BLOCK_BYTES])
            if not count:
                raise OSError(0, "it ends too early")
            self._digest.update(view[:count])
            view = view[count:]
        self.numel -= taken.numel()
        return taken

    @property
    def sha256(self) -> str:
        """Of all that was taken."""
        return self._digest.hexdigest()


class StateFile:
    """The places of the tensors in a rank's file, whose header is as it was written."""

    def __init__(self, path: Path, record: FileRecord) -> None:
        """Opens the file at `path`.

        Raises:
            DamagedCheckpointError: size or header are not as recorded.
            UnreadableCheckpointError: the system does not give it now.
        """
        self.path = path
        with self._readable() as file:
            size = path.stat().st_size
            if size != record.size_bytes:
                raise DamagedCheckpointError(
                    f"{path} has {size} bytes, {record.size_bytes} were written; "
                    "use another checkpoint"
                )
            length = file.read(_LENGTH_BYTES)
            header = file.read(min(struct.unpack("<Q", length)[0], size))
            written = record.header_sha256
            if written is not None and hashlib.sha256(length + header).hexdigest() != written:
                raise DamagedCheckpointError(
                    f"{path} does not hash to what was written: its header changed; "
                    "use another checkpoint"
                )
            self._places = _places(header, data_bytes=size - _LENGTH_BYTES - len(header))
        self._data_at = _LENGTH_BYTES + len(header)

    @contextmanager
    def opened(self, key: str) -> Iterator[Stretch]:
        """The tensor of that name, while the block lasts.

        Raises:
            DamagedCheckpointError: it is not there, or not whole.
            UnreadableCheckpointError: the system does not give it now.
        """
        if key not in self._places:
            raise DamagedCheckpointError(
                f"{self.path}: holds no fp32 tensor {key}; use another checkpoint"
            )
        begin, end = self._places[key]
        with self._readable() as file:
            file.seek(self._data_at + begin)
            yield Stretch(file, (end - begin) // _ITEM_BYTES)

    @contextmanager
    def _readable(self) -> Iterator[FileIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except (OSError, ValueError, struct.error) as error:
            if isinstance(error, OSError) and not is_damage(error):
                raise UnreadableCheckpointError.of(self.path, error) from error
            reason = getattr(error, "strerror", None) or error
            raise DamagedCheckpointError(
                f"{self.path} cannot be read ({reason}); use another checkpoint"
            ) from error


def _places(header: bytes, *, data_bytes: int) -> dict[str, tuple[int, int]]:
    """First and last byte of each fp32 tensor, counted from the end of the header.

    Raises:
        ValueError: the header is not one, or places tensors outside of the file.
    """
    found = {}
    try:
        for key, place in json.loads(header).items():
            if place.get("dtype") == "F32":
                begin, end = place["data_offsets"]
                if not 0 <= begin <= end <= data_bytes:
                    raise ValueError(f"its header places {key} outside of it")
                found[key] = (begin, end)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("its header is not that of a safetensors file") from error
    return found
