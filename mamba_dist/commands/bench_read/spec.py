"""What is read, who reads it, and what one turn tells."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

WINDOW_TOKENS: Final = 2049
"""2,048 inputs and the label of the last."""
OURS: Final = "ours"
MEMMAP: Final = "memmap"
ARROW: Final = "pyarrow"
MEGATRON: Final = "megatron"
DATASETS: Final = "datasets"
STREAMING: Final = "streaming"
LITDATA: Final = "litdata"
VARIANTS: Final = (MEMMAP, OURS, MEGATRON, ARROW, DATASETS, STREAMING, LITDATA)
SPARSE_VARIANTS: Final = (MEMMAP, OURS)

IntArray = npt.NDArray[np.int64]
WindowReader = Callable[[int], IntArray]
"""Gives window i of a split, tokens i·2049 to i·2049+2048, as (2049,) int64."""


class Tokens(Protocol):
    """The ids of all whole windows, in order, for a peer to write its own way."""

    def blocks(self) -> Iterator[npt.NDArray[np.uint16]]:
        """(windows, 2049) ids of some windows at a time."""

    def document_lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document; the last ends with the windows."""


class Peer(Protocol):
    """A module that writes tokens its way and reads windows of them."""

    def make(self, tokens: Tokens, folder: Path) -> None:
        """Writes into an empty folder."""

    def open_windows(self, folder: Path) -> WindowReader:
        """What reads the windows of a folder that `make` has filled."""


class Reader(Protocol):
    """A module that reads windows."""

    def open_windows(self, folder: Path) -> WindowReader:
        """What reads the windows of a folder."""


@dataclass(frozen=True)
class Job:
    """One variant's part of a round, in a process of its own: a folder with so many windows, of
    which `compared` are summed; a warm turn reads for `seconds` of CPU time at random, and as long
    in order.
    """

    task: Literal["cold", "warm"]
    variant: str
    folder: str
    windows: int
    compared: tuple[int, ...]
    seconds: float

    @property
    def files(self) -> list[Path]:
        """The files that the variant reads."""
        return sorted(p for p in Path(self.folder).rglob("*") if p.is_file())


@dataclass(frozen=True)
class ColdOpen:
    """A first open: seconds from after the imports to an open set, and to its first window; bytes
    that the process meanwhile fetched from storage, and by read calls; how many of the files' bytes
    were in the page cache before and after (None: files with holes, which are slow to ask about).
    """

    open_s: float
    first_s: float
    storage_bytes: int
    call_bytes: int
    cached_before_bytes: int | None
    cached_bytes: int | None


@dataclass(frozen=True)
class WarmTurns:
    """Windows from the page cache by one process, in turns with the others': windows per second of
    CPU time. `sums`: of the ids of the compared windows. `private_bytes`: memory that the process
    has written, at the end, beyond what it had after its imports.
    """

    random_per_s: Sequence[float]
    in_order_per_s: Sequence[float]
    private_bytes: int
    sums: Sequence[int]
