"""What one rank puts into a checkpoint, in two stages: a copy on the host, then files.

The copy is the last that is seen of training state, so that whoever writes it need not hold up the
next step. The file is a safetensors file with the keys `<parameter>|<kind>`; beside it, until the
commit, stands a record of its size and hashes.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mamba_dist.checkpoint.layout import rank_file
from mamba_dist.checkpoint.manifest import FileRecord, FragmentRecord, RankRecord
from mamba_dist.engine.base import STATE_KINDS, Fragment, StateKind

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class HostFragment:
    """A range of a parameter and of its moments: `start` in its elements, tensors (numel,) fp32."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[StateKind, Tensor]


def copied_to_host(fragments: Iterable[Fragment]) -> list[HostFragment]:
    """The fragments as they are now, in host memory of their own."""
    return [
        HostFragment(
            fragment.name,
            fragment.shape,
            fragment.start,
            # safetensors refuses tensors that share storage; ranges of one flat buffer do.
            {
                kind: fragment.tensor(kind).detach().to("cpu", copy=True).contiguous()
                for kind in STATE_KINDS
            },
        )
        for fragment in fragments
    ]


def write_rank(staging: Path, rank: int, fragments: Iterable[HostFragment]) -> None:
    """Writes the rank's file and its record into the staging folder, and forces both to the disk.

    Raises:
        OSError, safetensors.SafetensorError: they could not be written.
    """
    name = rank_file(rank)
    tensors: dict[str, Tensor] = {}
    records: list[FragmentRecord] = []
    shapes: dict[str, list[int]] = {}
    for fragment in fragments:
        hashes = {}
        for kind, tensor in fragment.tensors.items():
            tensors[tensor_key(fragment.name, kind)] = tensor
            hashes[f"{kind}_sha256"] = hashlib.sha256(tensor.numpy().data).hexdigest()
        shapes[fragment.name] = list(fragment.shape)
        records.append(
            FragmentRecord(
                name=fragment.name,
                file=name,
                start=fragment.start,
                numel=fragment.tensors["master"].numel(),
                **hashes,
            )
        )
    path = staging / name
    save_file(tensors, path)
    _sync_file(path)
    record = RankRecord(file=_file_record(path), shapes=shapes, fragments=records)
    write_synced(_record_path(staging, rank), record.model_dump_json())


def take_rank_records(staging: Path, *, ranks: int) -> list[RankRecord]:
    """What each rank has written, for the manifest."""
    return [
        RankRecord.model_validate_json(_record_path(staging, rank).read_bytes())
        for rank in range(ranks)
    ]


def remove_rank_records(staging: Path, *, ranks: int) -> None:
    """Removes what `take_rank_records` read, once the manifest says the same."""
    for rank in range(ranks):
        _record_path(staging, rank).unlink()


def tensor_key(name: str, kind: StateKind) -> str:
    """Name of a parameter's state in a rank's file."""
    return f"{name}|{kind}"


def write_synced(path: Path, text: str) -> None:
    """Writes a file and forces it to the disk."""
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _record_path(staging: Path, rank: int) -> Path:
    return staging / f"{rank_file(rank)}.json"


def _file_record(path: Path) -> FileRecord:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = file.read(8)
        digest.update(length + file.read(int.from_bytes(length, "little")))
        header = digest.hexdigest()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        return FileRecord(
            name=path.name,
            size_bytes=file.tell(),
            sha256=digest.hexdigest(),
            header_sha256=header,
        )


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
