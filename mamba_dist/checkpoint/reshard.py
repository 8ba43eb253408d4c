"""Which stored fragments make up a wanted range of a parameter.

A range is (start, numel) in the flattened parameter. Writers cut parameters by their number of
ranks and their engine; readers ask by theirs, so ranges rarely coincide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mamba_dist.checkpoint.manifest import FragmentRecord
from mamba_dist.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Elements `begin`..`end` of a stored fragment, counted from the fragment's own start."""

    fragment: FragmentRecord
    begin: int
    end: int


def require_exact_cover(name: str, numel: int, fragments: Sequence[FragmentRecord]) -> None:
    """Returns if the fragments cover 0..numel once.

    Raises:
        CheckpointError: elements are missing or stored twice.
    """
    position = 0
    for fragment in sorted(fragments, key=lambda f: f.start):
        if fragment.start != position:
            fault = "missing" if fragment.start > position else "stored twice"
            low, high = sorted((position, fragment.start))
            raise CheckpointError(
                f"parameter {name}: elements {low} to {high} are {fault}; use another checkpoint"
            )
        position += fragment.numel
    if position != numel:
        raise CheckpointError(
            f"parameter {name}: {position} elements stored, {numel} expected; "
            "use another checkpoint"
        )


def pieces_of_range(
    fragments: Sequence[FragmentRecord], *, start: int, numel: int
) -> tuple[Piece, ...]:
    """The parts of `fragments` that make up start..start+numel, in order."""
    end = start + numel
    return tuple(
        Piece(f, max(start, f.start) - f.start, min(end, f.start + f.numel) - f.start)
        for f in sorted(fragments, key=lambda f: f.start)
        if f.start < end and f.start + f.numel > start
    )
