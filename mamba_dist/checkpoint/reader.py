"""Reads checkpoints: the newest whole one of a run, and ranges of parameters in it.

A name is never trusted: a checkpoint counts only if every file has the size and hash that its
manifest says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mamba_dist.checkpoint.layout import (
    MANIFEST,
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    delete,
    set_aside,
    staged_steps,
    staging_folder,
)
from mamba_dist.checkpoint.manifest import (
    FragmentRecord,
    fragments_by_parameter,
    parameter_numel,
    read_manifest,
)
from mamba_dist.checkpoint.rank_file import tensor_key
from mamba_dist.checkpoint.ranks import OneRank, Ranks
from mamba_dist.checkpoint.reshard import pieces_of_range, require_exact_cover
from mamba_dist.checkpoint.state_file import StateFile, Stretch
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.config.schema import MambaConfig, RunConfig
from mamba_dist.engine.base import StateKind
from mamba_dist.errors import (
    CheckpointError,
    DamagedCheckpointError,
    OtherVersionError,
    UnreadableCheckpointError,
)


class CheckpointReader:
    """One committed checkpoint, readable by ranges of parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._fragments = fragments_by_parameter(self.manifest)
        self._files: dict[str, StateFile] = {}
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
        if not numel:
            return torch.empty(0)
        pieces = pieces_of_range(self._fragments[name], start=start, numel=numel)
        parts = [self._whole(p.fragment, kind)[p.begin : p.end] for p in pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])
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
            with self._stored(fragment, kind) as stretch:
                # To the end that the file has, were it another than recorded: the hash decides.
                while stretch.numel:
                    part = stretch.take(missing)
                    parts.append(part)
                    missing -= part.numel()
                    if not missing:
                        yield torch.cat(parts)
                        parts, missing = [], numel
        if parts:
            yield torch.cat(parts)

    def damaged_file(self, *, share: int = 0, shares: int = 1, contents: bool = True) -> str | None:
        """What is wrong with the first damaged file among every `shares`-th one, if any is.

        Without `contents`, tensors that are verified when they are read are left for then; those
        of a checkpoint that is too old for that are read.
        """
        for record in self.manifest.files[share::shares]:
            whole = contents or record.header_sha256 is None
            fragments = self.manifest.fragments if whole else None
            damage = next(file_damage(self.folder, [record], fragments=fragments), None)
            if damage is not None:
                if damage.unreadable is not None:
                    raise damage.unreadable
                return f"{damage}; use another checkpoint"
            try:
                self._file(record.name)
            except DamagedCheckpointError as error:
                return str(error)
        return None

    def _file(self, name: str) -> StateFile:
        if name not in self._files:
            record = next((r for r in self.manifest.files if r.name == name), None)
            if record is None:
                raise DamagedCheckpointError(
                    f"{self.folder / MANIFEST} places fragments in {name}, which has no hash; "
                    "use another checkpoint"
                )
            self._files[name] = StateFile(self.folder / name, record)
        return self._files[name]

    @contextmanager
    def _stored(self, fragment: FragmentRecord, kind: StateKind) -> Iterator[Stretch]:
        """A fragment's state, all of which the block must take."""
        with self._file(fragment.file).opened(tensor_key(fragment.name, kind)) as stretch:
            yield stretch
        if stretch.sha256 != getattr(fragment, f"{kind}_sha256"):
            raise DamagedCheckpointError(
                f"{self.folder / fragment.file}: {fragment.name} ({kind}) does not hash to what "
                "was written; use another checkpoint"
            )

    def _whole(self, fragment: FragmentRecord, kind: StateKind) -> Tensor:
        with self._stored(fragment, kind) as stretch:
            return stretch.take(stretch.numel)


class DamageNote:
    """Reads as `reader` does until a file is damaged or cannot be read, and gives zeros from there.

    So an engine comes to the end of loading on every rank, whose collectives would else wait for
    the one that met the damage.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.damage: DamagedCheckpointError | UnreadableCheckpointError | None = None
        self._reader = reader

    def read(self, name: str, kind: StateKind, *, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a parameter's flattened state, (numel,) fp32."""
        if self.damage is None:
            try:
                return self._reader.read(name, kind, start=start, numel=numel)
            except (DamagedCheckpointError, UnreadableCheckpointError) as error:
                self.damage = error
        return torch.zeros(numel)


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
            raise DamagedCheckpointError(damage)
        return reader
    found = find_checkpoint(path, ranks=OneRank(), notice=notice)
    if found is None:
        raise CheckpointError(
            f"{path}: no whole checkpoint found; name a run folder with checkpoints/step-… in it"
        )
    return found


def find_checkpoint(
    run_dir: Path,
    *,
    ranks: Ranks,
    notice: Callable[[str], None],
    at_most: int | None = None,
    before: int | None = None,
    contents: bool = True,
) -> CheckpointReader | None:
    """The newest committed checkpoint whose files are as written; None if the run has none at all.

    All ranks call it and get the same answer; each verifies its share of the files. `notice` is
    told of every checkpoint passed over. Those after `at_most` are not looked at; `before` passes
    over that step and later ones, as damaged. Without `contents`, tensors are left to be verified
    when they are read, see `damaged_file`.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        OtherVersionError: another version wrote the newest that is not damaged.
        UnreadableCheckpointError: on all ranks, if one of them cannot read one now.
    """
    # A network file system shows other nodes an old list for a while after a commit.
    listed = ranks.from_first(committed_steps(run_dir))
    steps = [s for s in listed if at_most is None or s <= at_most]
    for step in reversed(steps):
        if before is not None and step >= before:
            continue
        reader, damage = _try_open(checkpoint_folder(run_dir, step), ranks, contents=contents)
        require_readable(damage, ranks=ranks)
        if not ranks.any_rank(damage is not None):
            return reader
        notice(f"passing over step {step}: {damage or 'another rank found a damaged file'}")
    if steps:
        raise CheckpointError(
            f"{checkpoints_folder(run_dir)}: all {len(steps)} checkpoints are damaged; restore "
            "one, or train afresh in another run folder (training.run_dir=…)"
        )
    return None


def require_readable(fault: CheckpointError | None, *, ranks: Ranks) -> None:
    """Returns on all ranks unless the `fault` of one is that it cannot read a checkpoint now.

    Raises:
        UnreadableCheckpointError: on all ranks.
    """
    unreadable = fault if isinstance(fault, UnreadableCheckpointError) else None
    if ranks.any_rank(unreadable is not None):
        error = unreadable or UnreadableCheckpointError(
            "another rank cannot read a checkpoint now, and says which"
        )
        error.of_one_rank = unreadable is not None
        raise error


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

    Their steps are trained again, and neither their names nor retention may mistake them for whole;
    nor may a later start commit a save of such a step that could not be removed when it failed.
    """
    for staged in staged_steps(run_dir):
        if staged > step:
            delete(staging_folder(run_dir, staged))
    return [set_aside(run_dir, s, suffix=suffix) for s in committed_steps(run_dir) if s > step]


def _try_open(
    folder: Path, ranks: Ranks, *, contents: bool
) -> tuple[CheckpointReader | None, CheckpointError | None]:
    try:
        reader = CheckpointReader(folder)
        damage = reader.damaged_file(share=ranks.rank, shares=ranks.size, contents=contents)
    except OtherVersionError:
        # It is no damage: what was trained since the one before would be thrown away.
        raise
    except CheckpointError as error:
        return None, error
    return reader, None if damage is None else DamagedCheckpointError(damage)
