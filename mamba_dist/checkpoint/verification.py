"""Whether a checkpoint on disk is what its manifest says: sizes, hashes, every element once."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors

from mamba_dist.checkpoint.faults import is_damage
from mamba_dist.checkpoint.layout import MANIFEST
from mamba_dist.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    FragmentRecord,
    fragments_by_parameter,
    parameter_numel,
)
from mamba_dist.checkpoint.rank_file import tensor_key
from mamba_dist.checkpoint.reshard import require_exact_cover
from mamba_dist.checkpoint.state_file import StateFile
from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.errors import (
    CheckpointError,
    DamagedCheckpointError,
    UnreadableCheckpointError,
)

_BLOCK_BYTES = 1 << 22
_BLOCK_ITEMS = _BLOCK_BYTES // 4


@dataclass(frozen=True)
class Damage:
    """A file of a checkpoint and what is wrong with it."""

    path: Path
    fault: str
    unreadable: UnreadableCheckpointError | None = None
    """The system does not give the file now, which need not be damage."""

    def __str__(self) -> str:
        return f"{self.path} {self.fault}"


def file_damage(
    folder: Path,
    records: Iterable[FileRecord],
    *,
    fragments: Collection[FragmentRecord] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Damage]:
    """The files that are missing, or not as recorded, one fault each.

    Without the manifest's `fragments` only sizes are looked at, with them every byte. `advance` is
    told of the bytes done, which in the end are those of all records.
    """
    for record in records:
        path = folder / record.name
        hashed = 0
        try:
            size = path.stat().st_size
            if size != record.size_bytes:
                yield Damage(path, f"has {size} bytes, {record.size_bytes} were written")
            elif fragments is not None:
                own = [one for one in fragments if one.file == record.name]
                for count in _verified(path, record, own):
                    hashed += count
                    if advance is not None:
                        advance(count)
        except DamagedCheckpointError as error:
            yield Damage(path, str(error))
        except UnreadableCheckpointError as error:
            yield Damage(path, f"cannot be read ({error.reason})", unreadable=error)
        except OSError as error:
            away = None if is_damage(error) else UnreadableCheckpointError.of(path, error)
            yield Damage(path, f"cannot be read ({error.strerror})", unreadable=away)
        if advance is not None and hashed < record.size_bytes:
            advance(record.size_bytes - hashed)


def checkpoint_damage(
    folder: Path, manifest: CheckpointManifest, *, advance: Callable[[int], None] | None = None
) -> Iterator[Damage]:
    """All that is wrong: files first, then elements that are missing or stored twice."""
    damaged = set()
    for damage in file_damage(
        folder, manifest.files, fragments=manifest.fragments, advance=advance
    ):
        damaged.add(damage.path.name)
        yield damage
    for name, fragments in fragments_by_parameter(manifest).items():
        try:
            require_exact_cover(name, parameter_numel(manifest, name), fragments)
        except CheckpointError as error:
            yield Damage(folder / MANIFEST, f"is incomplete: {error}")
    yield from _tensor_damage(folder, manifest, passed_over=damaged)


def _tensor_damage(
    folder: Path, manifest: CheckpointManifest, *, passed_over: Collection[str]
) -> Iterator[Damage]:
    by_file: dict[str, list[FragmentRecord]] = {record.name: [] for record in manifest.files}
    for fragment in manifest.fragments:
        by_file.setdefault(fragment.file, []).append(fragment)
    listed = {record.name for record in manifest.files}
    for name, fragments in by_file.items():
        if name not in listed:
            yield Damage(folder / MANIFEST, f"places fragments in {name}, which has no hash")
        elif name not in passed_over:
            yield from _header_damage(folder / name, fragments)


def _header_damage(path: Path, fragments: Iterable[FragmentRecord]) -> Iterator[Damage]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            unclaimed = set(file.keys())
            for fragment in fragments:
                for kind in STATE_KINDS:
                    key = tensor_key(fragment.name, kind)
                    if key not in unclaimed:
                        yield Damage(path, f"lacks {key}, or places it twice")
                        continue
                    unclaimed.remove(key)
                    stored = file.get_slice(key)
                    found = (stored.get_dtype(), stored.get_shape())
                    if found != ("F32", [fragment.numel]):
                        yield Damage(
                            path,
                            f"holds {key} as {found[0]} {found[1]}, expected F32 "
                            f"[{fragment.numel}]",
                        )
    except (OSError, safetensors.SafetensorError) as error:
        yield Damage(path, f"cannot be read ({error})")
        return
    for key in sorted(unclaimed):
        yield Damage(path, f"holds {key}, which the manifest does not place")


def _verified(path: Path, record: FileRecord, fragments: Iterable[FragmentRecord]) -> Iterator[int]:
    """Sizes of the parts that were read, each of them hashed.

    Raises:
        DamagedCheckpointError: bytes are not as written; the message goes on from the path.
        OSError: they cannot be read.
    """
    changed = DamagedCheckpointError("does not hash to what was written: its contents changed")
    if record.sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                yield len(block)
        if digest.hexdigest() != record.sha256:
            raise changed
        return
    if record.header_sha256 is None:
        raise DamagedCheckpointError("is recorded without a hash")
    try:
        tensors = StateFile(path, record)
        for fragment in fragments:
            for kind in STATE_KINDS:
                with tensors.opened(tensor_key(fragment.name, kind)) as stretch:
                    while stretch.numel:
                        yield stretch.take(_BLOCK_ITEMS).nbytes
                if stretch.sha256 != getattr(fragment, f"{kind}_sha256"):
                    raise changed
    except DamagedCheckpointError as error:
        # Those of a file begin with its path and end with what to do.
        fault = str(error).removeprefix(f"{path}").lstrip(": ").partition(";")[0]
        raise DamagedCheckpointError(fault) from error
