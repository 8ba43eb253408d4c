"""What the benchmark's parent and workers say to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

import torch

from mamba_dist.commands.bench.cases import Case
from mamba_dist.config.schema import MambaConfig

# One head of Mamba-2 fills 64 channels.
_TINY_WIDTH: Final = 32
_TINY_LENGTH: Final = 8
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """The key of DTYPES."""
    return next(name for name, value in DTYPES.items() if value == dtype)


@dataclass(frozen=True)
class OpSpec:
    """One variant of one op."""

    variant: str
    case: Case

    def tiny(self) -> "OpSpec":
        """The same for a few steps in time."""
        sizes = {**self.case.sizes, "L": min(self.case.sizes["L"], _TINY_LENGTH)}
        return replace(self, case=replace(self.case, sizes=sizes))


@dataclass(frozen=True)
class TrainSpec:
    """One variant of a language model's training step."""

    variant: str
    config: MambaConfig
    batch: int
    length: int
    dtype: torch.dtype
    """bf16 runs under autocast; parameters are fp32 either way."""
    optimizer: bool
    """AdamW's update belongs to the step."""

    def tiny(self) -> "TrainSpec":
        """The same for a narrow model of one layer and a few steps in time."""
        changes = {"d_model": _TINY_WIDTH, "n_layers": 1, "vocab_size": _TINY_WIDTH}
        config = self.config.model_copy(update=changes)
        return replace(self, config=config, length=min(self.length, _TINY_LENGTH))


Spec = OpSpec | TrainSpec


@dataclass(frozen=True)
class Outcome:
    """What a worker knows at its end.

    peak_bytes: the most memory held while building the job and running its steps, beyond what the
        process held before.
    errors: deviation from the float64 truth by output or gradient; None if there is no such truth.
    allowed: the largest of them that passes.
    """

    peak_bytes: int
    errors: Mapping[str, float] | None
    allowed: float


class NotMeasuredError(Exception):
    """A variant cannot run here; the message says why and what would help."""


class Job(Protocol):
    """What a worker repeats."""

    allowed: float

    def step(self) -> None:
        """One forward and backward."""

    def errors(self) -> dict[str, float] | None:
        """See `Outcome`; called once, after the last step."""


class Worker(Protocol):
    """A process, or this one, that runs a job when it is told to."""

    @property
    def pid(self) -> int:
        """Whose CPU time is not other load."""

    def start(self) -> float:
        """Seconds of the first step, after building the job.

        Raises:
            NotMeasuredError: the job cannot run here.
        """

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""

    def finish(self) -> Outcome:
        """Memory and errors, after the last step."""

    def close(self) -> None:
        """Ends it."""


Allocator = Literal["default", "tuned"]
"""glibc's malloc as it is, or told to keep freed memory instead of giving it back."""


@dataclass(frozen=True)
class Row:
    """One variant of a group.

    name: its key. tokens: positions per step.
    """

    name: str
    description: str
    tokens: int


@dataclass(frozen=True)
class Group:
    """Variants to be measured in turns.

    baselines: names in order of preference; the others are compared with the first one that can be
    measured. limit: the name of the variant whose speed and memory are the bound.
    """

    title: str
    rows: Sequence[Row]
    specs: Mapping[str, Spec]
    allocator: Allocator
    baselines: Sequence[str]
    limit: str | None = None
