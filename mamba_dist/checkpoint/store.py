"""Writes and reads checkpoints: staged, hashed, fsynced, committed by one rename.

A reader never trusts a name: a checkpoint counts only if every file has the size and hash that its
manifest says. Each rank writes the fragments it owns into one safetensors file with the keys
`<parameter>|<kind>`.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from mamba_dist.checkpoint.layout import (
    MANIFEST,
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    rank_file,
    remove_checkpoint,
    set_aside,
    staging_folder,
    steps_to_remove,
    sync_folder,
)
from mamba_dist.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    FragmentRecord,
    Progress,
    RankRecord,
    TokenizerRecord,
    fragments_by_parameter,
    manifest_text,
    parameter_numel,
    read_manifest,
)
from mamba_dist.checkpoint.reshard import pieces_of_range, require_exact_cover
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.config.schema import MambaConfig, RunConfig
from mamba_dist.engine.base import STATE_KINDS, Fragment, StateKind
from mamba_dist.errors import CheckpointError


class Ranks(Protocol):
    """What a save needs of the other ranks."""

    rank: int
    size: int

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank; also a barrier."""


@dataclass(frozen=True)
class Snapshot:
    """The state to write: where the run is, and this rank's fragments."""

    progress: Progress
    adam_steps: int
    fragments: Iterable[Fragment]
    config: RunConfig
    tokenizer: TokenizerRecord
    engine: str
    versions: dict[str, str]


def save_checkpoint(run_dir: Path, snapshot: Snapshot, *, ranks: Ranks) -> Path:
    """The committed folder; called by all ranks, returns on all of them after the commit.

    Raises:
        CheckpointError: on every rank, if any rank could not write; nothing is committed then and
        the
            checkpoints before are untouched.
    """
    step = snapshot.progress.step
    folder, staging = checkpoint_folder(run_dir, step), staging_folder(run_dir, step)
    with _agreed(ranks, staging):
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    with _agreed(ranks, staging):
        _write_rank(staging, ranks.rank, snapshot.fragments)
    with _agreed(ranks, staging):
        if ranks.rank == 0:
            _commit(staging, folder, snapshot, ranks.size)
    return folder


def apply_retention(run_dir: Path, *, keep_last: int, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints were deleted; call on one rank only."""
    doomed = steps_to_remove(committed_steps(run_dir), keep_last=keep_last, keep_every=keep_every)
    for step in doomed:
        remove_checkpoint(run_dir, step)
    return doomed


class CheckpointReader:
    """One committed checkpoint, readable by ranges of parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._fragments = fragments_by_parameter(self.manifest)
        for name, fragments in self._fragments.items():
            require_exact_cover(name, parameter_numel(self.manifest, name), fragments)

    @property
    def config(self) -> RunConfig:
        """The resolved configuration of the run that wrote it."""
        return self.manifest.config

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return self.manifest.progress.step

    def read(self, name: str, kind: StateKind, *, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of the flattened state of a parameter, (numel,) fp32.

        Raises:
            CheckpointError: the parameter is not in it, or bytes do not hash to what was written.
        """
        if name not in self._fragments:
            raise CheckpointError(
                f"{self.folder}: has no parameter {name}; it belongs to another model"
            )
        pieces = pieces_of_range(self._fragments[name], start=start, numel=numel)
        parts = [self._stored(p.fragment, kind)[p.begin : p.end] for p in pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.numel() != numel:
            raise CheckpointError(
                f"{self.folder}: parameter {name} has shape {self.manifest.shapes[name]}, elements "
                f"{start} to {start + numel} were asked for; it belongs to another model"
            )
        return whole

    def read_parameters(self) -> dict[str, Tensor]:
        """All parameters, whole, fp32, by name; tied weights once."""
        return {
            name: self.read(name, "master", start=0, numel=torch.Size(shape).numel()).reshape(shape)
            for name, shape in self.manifest.shapes.items()
        }

    def blocks(self, name: str, kind: StateKind, *, numel: int) -> Iterator[Tensor]:
        """The flattened state of a parameter in its order, (numel,) fp32 each, the last shorter.

        No more than a block is held at a time, however the writer had cut the parameter.

        Raises:
            CheckpointError: a fragment that ended does not hash to what was written.
        """
        parts: list[Tensor] = []
        missing = numel
        for fragment in self._fragments[name]:
            digest = hashlib.sha256()
            with self._opened(fragment) as file:
                stored = file.get_slice(f"{name}|{kind}")
                begin = 0
                # To the end that the file has, were it another than recorded: the hash decides.
                while (part := stored[begin : begin + missing]).numel():
                    digest.update(part.numpy().data)
                    parts.append(part)
                    begin, missing = begin + part.numel(), missing - part.numel()
                    if not missing:
                        yield torch.cat(parts)
                        parts, missing = [], numel
            self._require_hash(fragment, kind, digest.hexdigest())
        if parts:
            yield torch.cat(parts)

    def damaged_file(self, *, share: int = 0, shares: int = 1) -> str | None:
        """What is wrong with the first damaged file among every `shares`-th one, if any is."""
        damage = next(file_damage(self.folder, self.manifest.files[share::shares]), None)
        return None if damage is None else str(damage)

    def _stored(self, fragment: FragmentRecord, kind: StateKind) -> Tensor:
        with self._opened(fragment) as file:
            tensor: Tensor = file.get_tensor(f"{fragment.name}|{kind}")
        self._require_hash(fragment, kind, _sha256_of_tensor(tensor))
        return tensor

    @contextmanager
    def _opened(self, fragment: FragmentRecord) -> Iterator[Any]:
        path = self.folder / fragment.file
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); use another checkpoint"
            ) from error

    def _require_hash(self, fragment: FragmentRecord, kind: StateKind, found: str) -> None:
        if found != _hash_of(fragment, kind):
            raise CheckpointError(
                f"{self.folder / fragment.file}: {fragment.name} ({kind}) does not hash to what "
                "was written; use another checkpoint"
            )


def open_checkpoint(path: Path, *, notice: Callable[[str], None]) -> CheckpointReader:
    """The checkpoint at `path`, or the newest one that is whole if `path` is a run folder.

    `notice` is told of every checkpoint of the run that is passed over.

    Raises:
        CheckpointError: there is none, or the named one is damaged.
    """
    if (path / MANIFEST).is_file() and not checkpoints_folder(path).is_dir():
        reader = CheckpointReader(path)
        damage = reader.damaged_file()
        if damage:
            raise CheckpointError(f"{damage}; use another checkpoint")
        return reader
    found = find_checkpoint(path, ranks=_OneRank(), notice=notice)
    if found is None:
        raise CheckpointError(
            f"{path}: no whole checkpoint found; name a run folder with checkpoints/step-… in it"
        )
    return found


def find_checkpoint(
    run_dir: Path, *, ranks: Ranks, notice: Callable[[str], None], at_most: int | None = None
) -> CheckpointReader | None:
    """The newest committed checkpoint whose files are as written; None if the run has none at all.

    Those after step `at_most` are not looked at. All ranks call it and get the same answer; each
    verifies its share of the files. `notice` is told of every checkpoint passed over.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    steps = [s for s in committed_steps(run_dir) if at_most is None or s <= at_most]
    for step in reversed(steps):
        reader, damage = _try_open(checkpoint_folder(run_dir, step), ranks)
        if not ranks.any_rank(damage is not None):
            return reader
        notice(f"passing over step {step}: {damage or 'another rank found a damaged file'}")
    if steps:
        raise CheckpointError(
            f"{checkpoints_folder(run_dir)}: all {len(steps)} checkpoints are damaged; restore "
            "one, or train afresh in another run folder (training.run_dir=…)"
        )
    return None


def require_same_model(reader: CheckpointReader, model: MambaConfig) -> None:
    """Returns if the checkpoint's model section equals `model`.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    theirs, ours = reader.config.model.model_dump(), model.model_dump()
    for field, value in ours.items():
        if theirs[field] != value:
            raise CheckpointError(
                f"{reader.folder}: was written with model.{field} = {theirs[field]!r}, the config "
                f"says {value!r}; restore the field, or set another training.run_dir"
            )


def set_aside_newer(run_dir: Path, step: int, *, suffix: str = ".damaged") -> list[str]:
    """Renames the checkpoints after `step`, found damaged or abandoned; call on one rank only.

    Their steps are trained again, and neither their names nor retention may mistake them for whole.
    """
    return [set_aside(run_dir, s, suffix=suffix) for s in committed_steps(run_dir) if s > step]


class _OneRank:
    rank = 0
    size = 1

    def any_rank(self, flag: bool) -> bool:
        return flag


@contextmanager
def _agreed(ranks: Ranks, staging: Path) -> Iterator[None]:
    """Runs a stage of a save; if it fails on any rank, all raise and none waits for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        # Whatever it was: a rank that left here alone would leave the others in the collective.
        failure = error
    if ranks.any_rank(failure is not None):
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        reason = failure or "another rank could not write"
        raise CheckpointError(
            f"{staging}: checkpoint not written ({reason}); the ones before are untouched"
        ) from failure


def _write_rank(staging: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    tensors: dict[str, Tensor] = {}
    records: list[FragmentRecord] = []
    shapes: dict[str, list[int]] = {}
    name = rank_file(rank)
    for fragment in fragments:
        hashes = {}
        for kind in STATE_KINDS:
            tensor = fragment.tensor(kind).detach().to("cpu").contiguous()
            tensors[f"{fragment.name}|{kind}"] = tensor
            hashes[f"{kind}_sha256"] = _sha256_of_tensor(tensor)
        shapes[fragment.name] = list(fragment.shape)
        records.append(
            FragmentRecord(
                name=fragment.name,
                file=name,
                start=fragment.start,
                numel=fragment.master.numel(),
                **hashes,
            )
        )
    path = staging / name
    # safetensors refuses tensors that share storage; ranges of one flat buffer do.
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    _sync_file(path)
    record = RankRecord(
        file=FileRecord(name=name, size_bytes=path.stat().st_size, sha256=_sha256_of_file(path)),
        shapes=shapes,
        fragments=records,
    )
    _write_synced(_rank_record(staging, rank), record.model_dump_json())


def _commit(staging: Path, folder: Path, snapshot: Snapshot, world_size: int) -> None:
    records = [
        RankRecord.model_validate_json(_rank_record(staging, rank).read_bytes())
        for rank in range(world_size)
    ]
    shapes: dict[str, list[int]] = {}
    for record in records:
        shapes.update(record.shapes)
    manifest = CheckpointManifest(
        progress=snapshot.progress,
        adam_steps=snapshot.adam_steps,
        world_size=world_size,
        engine=snapshot.engine,
        versions=snapshot.versions,
        config=snapshot.config,
        tokenizer=snapshot.tokenizer,
        shapes=shapes,
        files=[record.file for record in records],
        fragments=[fragment for record in records for fragment in record.fragments],
    )
    _write_synced(staging / MANIFEST, manifest_text(manifest))
    for rank in range(world_size):
        _rank_record(staging, rank).unlink()
    sync_folder(staging)
    os.rename(staging, folder)
    sync_folder(folder.parent)


def _try_open(folder: Path, ranks: Ranks) -> tuple[CheckpointReader | None, str | None]:
    try:
        reader = CheckpointReader(folder)
    except CheckpointError as error:
        return None, str(error)
    return reader, reader.damaged_file(share=ranks.rank, shares=ranks.size)


def _rank_record(staging: Path, rank: int) -> Path:
    return staging / f"{rank_file(rank)}.json"


def _hash_of(fragment: FragmentRecord, kind: StateKind) -> str:
    value: str = getattr(fragment, f"{kind}_sha256")
    return value


def _sha256_of_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
