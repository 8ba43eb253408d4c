"""The last checkpoints of the two runs beside each other."""

import math
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.checkpoint.comparison import field_differences
from mamba_dist.checkpoint.inspection import squared_norm
from mamba_dist.checkpoint.layout import checkpoint_folder
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.errors import CheckpointError


@dataclass(frozen=True)
class WeightDifference:
    """`relative_l2` is the L2 of the difference of all weights over that of the undisturbed run's;
    `fields` are what else of the state differs; `missing` says why nothing could be compared."""

    relative_l2: float
    fields: tuple[str, ...] = ()
    missing: str | None = None

    def faults(self, tolerance: float) -> list[str]:
        """What is wrong, nothing if the weights are within the tolerance."""
        if self.missing is not None:
            return [self.missing]
        near = self.relative_l2 <= tolerance
        return [
            *([] if near else [f"the weights differ by {self.relative_l2:.2g} (relative L2)"]),
            *self.fields,
        ]


def weight_difference(whole_dir: Path, soaked_dir: Path, *, step: int) -> WeightDifference:
    """How far the soaked run's last checkpoint is from the undisturbed run's."""
    try:
        whole, soaked = (
            CheckpointReader(checkpoint_folder(one, step)) for one in (whole_dir, soaked_dir)
        )
        wanted, found = whole.read_parameters(), soaked.read_parameters()
        fields = field_differences(whole.manifest, soaked.manifest)
        norm = sum(squared_norm(one) for one in wanted.values())
        delta = sum(squared_norm(found[name] - one) for name, one in wanted.items())
    except CheckpointError as error:
        return WeightDifference(math.inf, missing=str(error))
    return WeightDifference(
        math.sqrt(delta / norm),
        tuple(
            f"{field.name} is {field.second}, expected {field.first}"
            for field in fields
            # Those two are losses and norms of steps, which are compared as such.
            if field.is_state and not field.name.startswith("recent_")
        ),
    )
