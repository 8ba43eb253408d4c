"""What becomes of a variant that fails on a GPU: its reason, and whether the device is left to the
others.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.errors import MambaDistError

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Failure:
    """Why a call has no answer, in one line."""

    reason: str


class Attempts:
    """Calls on one device that may fail in whatever way, while the others go on.

    Some CUDA errors (an illegal address, a failed assertion in a kernel) are the last thing that a
    process does with its device: every later call repeats them. What comes after one is not tried,
    and says whose error it was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lost: str | None = None
        """Who has made the device unusable, and how; None as long as it works."""

    def told(self, name: str, call: Callable[[], _Answer]) -> _Answer | Failure:
        """What the call returns once the device has done its work, or why it has not."""
        if self.lost is not None:
            return Failure(self.lost)
        try:
            answer = call()
            # An error of a kernel shows at the next wait, which must not be somebody else's.
            self._wait()
        # Whatever a kernel dies of.
        except Exception as error:
            reason = reason_of(error)
            self._probe(name, reason)
            return Failure(reason)
        return answer

    def _probe(self, name: str, reason: str) -> None:
        try:
            self._wait()
        except Exception:
            self.lost = (
                f"{name} has left the device unusable to this process ({reason}); leave it out by "
                "--variants to measure the others"
            )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reason_of(error: Exception) -> str:
    """One line about a failure, for a table; what only a developer understands goes to stderr."""
    if isinstance(error, MambaDistError | NotMeasuredError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".partition("\n")[0]
