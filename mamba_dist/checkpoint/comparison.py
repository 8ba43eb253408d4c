"""What differs between two checkpoints of one model, however many ranks and engines cut each."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mamba_dist.checkpoint.inspection import BLOCK_NUMEL, squared_norm
from mamba_dist.checkpoint.manifest import CheckpointManifest
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.engine.base import STATE_KINDS, StateKind
from mamba_dist.errors import CheckpointError


@dataclass(frozen=True)
class FieldDifference:
    """A recorded value that differs. `is_state`: training would go on differently by it alone."""

    name: str
    first: Any
    second: Any
    is_state: bool


@dataclass(frozen=True)
class StateDifference:
    """How one kind of state of a parameter differs; `relative_l2` is ‖second - first‖ / ‖first‖.

    Both are nan or inf where elements that differ are not finite; `relative_l2` is nan where any
    element of the first is not, and inf where the first is all zero.
    """

    name: str
    kind: StateKind
    numel: int
    differing: int
    max_difference: float
    relative_l2: float


def require_comparable(first: CheckpointReader, second: CheckpointReader) -> None:
    """Returns if both have the same parameters with the same shapes.

    Raises:
        CheckpointError: naming a parameter and the fields of the model section that differ.
    """
    ours, theirs = first.manifest.shapes, second.manifest.shapes
    if ours == theirs:
        return
    name = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
    fields = _differing(first.config.model.model_dump(), second.config.model.model_dump())
    why = ", ".join(f"model.{field} {a!r} and {b!r}" for field, a, b in fields)
    raise CheckpointError(
        f"{first.folder} and {second.folder} hold different models: parameter {name} has shape "
        f"{ours.get(name, 'none')} and {theirs.get(name, 'none')}"
        f"{f' ({why})' if why else ''}; compare checkpoints of one model"
    )


def field_differences(
    first: CheckpointManifest, second: CheckpointManifest
) -> list[FieldDifference]:
    """What the manifests say differently of progress, tokenizer, config, versions and writer.

    Where a data set lies is a matter of the config; its fingerprint is one of progress.
    """
    sections = [
        ("", _progress(first), _progress(second), True),
        ("tokenizer", first.tokenizer.model_dump(), second.tokenizer.model_dump(), True),
        ("", _writer(first), _writer(second), False),
        ("versions", first.versions, second.versions, False),
        ("config", first.config.model_dump(), second.config.model_dump(), False),
    ]
    return [
        FieldDifference(f"{section}.{name}" if section else name, a, b, is_state)
        for section, ours, theirs, is_state in sections
        for name, a, b in _differing(ours, theirs)
    ]


def state_differences(
    first: CheckpointReader,
    second: CheckpointReader,
    *,
    block_numel: int = BLOCK_NUMEL,
    advance: Callable[[int], None] | None = None,
) -> list[StateDifference]:
    """Parameters and moments of which any bit differs, the worst relative L2 first.

    One block of each is held at a time. `advance` is told of the bytes read of each checkpoint,
    `state_bytes` in all.

    Raises:
        CheckpointError: the models differ, or a file is damaged.
    """
    require_comparable(first, second)
    found = []
    for name in first.manifest.shapes:
        for kind in STATE_KINDS:
            difference = _state_difference(
                name,
                kind,
                zip(
                    first.blocks(name, kind, numel=block_numel),
                    second.blocks(name, kind, numel=block_numel),
                    strict=True,
                ),
                advance=advance,
            )
            if difference.differing:
                found.append(difference)
    return sorted(found, key=_badness, reverse=True)


def _state_difference(
    name: str,
    kind: StateKind,
    blocks: Iterator[tuple[Tensor, Tensor]],
    *,
    advance: Callable[[int], None] | None,
) -> StateDifference:
    numel = differing = 0
    largest = squares = reference = 0.0
    for ours, theirs in blocks:
        # Bits, so that a NaN equals itself and 0 is not -0.
        unequal = ours.view(torch.int32) != theirs.view(torch.int32)
        delta = torch.where(unequal, theirs.double() - ours.double(), 0.0)
        numel += delta.numel()
        differing += int(unequal.sum())
        largest = max(largest, float(delta.abs().max()), key=_nan_as_worst)
        squares += squared_norm(delta)
        reference += squared_norm(ours)
        if advance is not None:
            advance(ours.nbytes)
    relative = _relative_l2(squares, reference)
    return StateDifference(name, kind, numel, differing, largest, relative)


def _relative_l2(squares: float, reference: float) -> float:
    if not math.isfinite(reference):
        return math.nan
    if not reference:
        return math.inf if squares else 0.0
    return math.sqrt(squares / reference)


def _badness(difference: StateDifference) -> tuple[float, float]:
    return _nan_as_worst(difference.relative_l2), _nan_as_worst(difference.max_difference)


def _nan_as_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _progress(manifest: CheckpointManifest) -> dict[str, Any]:
    fields: dict[str, Any] = manifest.progress.model_dump(exclude={"segments"})
    fields["adam_steps"] = manifest.adam_steps
    # A list is compared as a whole: segments that begin elsewhere do not correspond.
    fields["segments"] = [
        asdict(replace(segment, sources=tuple(replace(s, path="") for s in segment.sources)))
        for segment in manifest.progress.segments
    ]
    return fields


def _writer(manifest: CheckpointManifest) -> dict[str, Any]:
    return {"world_size": manifest.world_size, "engine": manifest.engine}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, value) of each leaf that differs; None where one has no such leaf."""
    found = []
    for name in [*first, *(name for name in second if name not in first)]:
        a, b = first.get(name), second.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [(f"{name}.{rest}", x, y) for rest, x, y in _differing(a, b)]
        elif a != b:
            found.append((name, a, b))
    return found
