"""What a checkpoint holds, for people: found by the name they give, described, and measured."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from mamba_dist.checkpoint.layout import (
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    unfinished,
)
from mamba_dist.checkpoint.manifest import CheckpointManifest, parameter_numel
from mamba_dist.checkpoint.reader import CheckpointReader, open_checkpoint
from mamba_dist.checkpoint.staged import written_steps
from mamba_dist.checkpoint.verification import file_damage
from mamba_dist.data.segments import RunOrder, SourceRecord, shares
from mamba_dist.engine.base import STATE_KINDS, StateKind
from mamba_dist.errors import CheckpointError

BLOCK_NUMEL = 1 << 18
"""Elements of a parameter that are looked at at once, 1 MiB: 2^22 took 8 times the memory and
more time, as every block was fresh memory."""

_STEPS_SHOWN = 8


@dataclass(frozen=True)
class SourceShare:
    """One data set in a segment; `share` of the samples while no source is exhausted."""

    path: str
    fingerprint: str
    share: float


@dataclass(frozen=True)
class SegmentDescription:
    """A stretch of steps, counted from 0, with one mixture and one batch size; `end_step` is where
    the next begins, None in the last."""

    first_step: int
    end_step: int | None
    first_sample: int
    global_batch_size: int
    sources: list[SourceShare]


@dataclass(frozen=True)
class SourceCursor:
    """Where a run stands in one data set: `epoch` counts from 0, `epoch_share` of it was read."""

    path: str
    fingerprint: str
    samples_per_epoch: int
    samples_read: int
    epoch: int
    epoch_share: float
    exhausted: bool


@dataclass(frozen=True)
class ParameterStatistics:
    """One parameter, fragments of all ranks together; a norm is None if elements are not finite."""

    name: str
    shape: list[int]
    dtype: str
    norms: dict[StateKind, float | None]
    non_finite: dict[StateKind, int]


def find_folder(
    path: Path, *, step: int | None, whole: bool, notice: Callable[[str], None]
) -> Path:
    """The folder of the checkpoint at `path`: itself, or of a run folder that of `step`.

    Without a step it is the newest committed one of the run or, if `whole`, the newest that a
    resume would take, every byte of which is read for that; `notice` is told so, and of those
    passed over.

    Raises:
        CheckpointError: there is none, or its write or deletion did not end.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {found}; name a run folder or a step-… folder in it")
    if checkpoints_folder(path).is_dir():
        return _folder_in_run(path, step=step, whole=whole, notice=notice)
    if step is not None:
        raise CheckpointError(f"{path}: --step needs a run folder, this has no checkpoints/ in it")
    if unfinished(path):
        raise CheckpointError(
            f"{path}: is no checkpoint but what an interrupted save or deletion left behind; "
            "use a committed one (step-… without a suffix); the next start of the run commits a "
            "save that lacks nothing else"
        )
    return path


def open_sized(folder: Path) -> CheckpointReader:
    """The checkpoint in `folder` if all its files have their size; contents are not read yet.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    reader = CheckpointReader(folder)
    damage = next(file_damage(folder, reader.manifest.files), None)
    if damage is not None:
        raise CheckpointError(f"{damage}; use another checkpoint, or see --verify")
    return reader


def parameter_count(manifest: CheckpointManifest) -> int:
    """Elements of all parameters, tied weights once, padding rows of the vocabulary included."""
    return sum(parameter_numel(manifest, name) for name in manifest.shapes)


def state_bytes(manifest: CheckpointManifest) -> int:
    """Bytes of all parameters and moments in fp32, which is what reading them all reads."""
    return 4 * len(STATE_KINDS) * parameter_count(manifest)


def segment_descriptions(manifest: CheckpointManifest) -> list[SegmentDescription]:
    """The order of samples up to here; nothing if the checkpoint is older than its record."""
    segments = manifest.progress.segments
    ends = [*(segment.first_step for segment in segments[1:]), None][: len(segments)]
    return [
        SegmentDescription(
            segment.first_step,
            end,
            segment.first_position,
            segment.global_batch_size,
            [
                SourceShare(source.path, source.fingerprint, float(share))
                for source, share in _with_shares(segment.sources)
            ],
        )
        for segment, end in zip(segments, ends, strict=True)
    ]


def source_cursors(manifest: CheckpointManifest) -> list[SourceCursor]:
    """Where the run stands in each data set that it ever read, by fingerprint."""
    progress, data = manifest.progress, manifest.config.data
    if not progress.segments:
        return []
    order = RunOrder(progress.segments, seed=data.seed, shuffle=data.shuffle)
    sources = {s.fingerprint: s for segment in progress.segments for s in segment.sources}
    taken = order.taken(progress.next_sample)
    return [
        _cursor(source, taken.get(fingerprint, 0))
        for fingerprint, source in sorted(sources.items())
    ]


def parameter_statistics(
    reader: CheckpointReader,
    *,
    block_numel: int = BLOCK_NUMEL,
    advance: Callable[[int], None] | None = None,
) -> Iterator[ParameterStatistics]:
    """Norms and counts of every parameter and its moments; one block is held at a time.

    `advance` is told of the bytes read, `state_bytes` in all.

    Raises:
        CheckpointError: a file cannot be read, or does not hash to what was written.
    """
    for name, shape in reader.manifest.shapes.items():
        norms: dict[StateKind, float | None] = {}
        non_finite: dict[StateKind, int] = {}
        dtype = torch.float32
        for kind in STATE_KINDS:
            squares, non_finite[kind] = 0.0, 0
            for block in reader.blocks(name, kind, numel=block_numel):
                dtype = block.dtype
                squares += squared_norm(block)
                non_finite[kind] += block.numel() - int(torch.isfinite(block).sum())
                if advance is not None:
                    advance(block.nbytes)
            norms[kind] = None if non_finite[kind] else math.sqrt(squares)
        yield ParameterStatistics(name, shape, str(dtype).removeprefix("torch."), norms, non_finite)


def squared_norm(block: Tensor) -> float:
    """The sum of squares, in fp64."""
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _folder_in_run(
    run_dir: Path, *, step: int | None, whole: bool, notice: Callable[[str], None]
) -> Path:
    steps = committed_steps(run_dir)
    if not steps:
        left = [e.name for e in sorted(checkpoints_folder(run_dir).iterdir()) if unfinished(e)]
        also = f", only {', '.join(left)}, which an interruption left behind" if left else ""
        if written := written_steps(run_dir):
            also += f" (the next start of the run commits that of step {written[-1]})"
        raise CheckpointError(
            f"{run_dir}: no committed checkpoint in its {checkpoints_folder(run_dir).name}/{also}; "
            "name another run folder"
        )
    if step is None:
        if whole:
            notice(f"{run_dir}: reading every byte to find its newest whole checkpoint")
            return open_checkpoint(run_dir, notice=notice).folder
        return checkpoint_folder(run_dir, steps[-1])
    if step not in steps:
        shown = ", ".join(str(each) for each in steps[-_STEPS_SHOWN:])
        raise CheckpointError(
            f"{run_dir}: has no checkpoint of step {step}; expected one of "
            f"{'…, ' if len(steps) > _STEPS_SHOWN else ''}{shown}"
        )
    return checkpoint_folder(run_dir, step)


def _with_shares(sources: tuple[SourceRecord, ...]) -> list[tuple[SourceRecord, Fraction]]:
    by_fingerprint = shares(sources)
    return [(source, by_fingerprint[source.fingerprint]) for source in sources]


def _cursor(source: SourceRecord, taken: int) -> SourceCursor:
    epoch, number = divmod(taken, source.samples)
    return SourceCursor(
        source.path,
        source.fingerprint,
        source.samples,
        taken,
        epoch,
        number / source.samples,
        source.max_epochs is not None and epoch >= source.max_epochs,
    )
