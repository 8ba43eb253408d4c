"""The limit: one flat file of ids through `numpy.memmap`, without documents, as nanoGPT reads."""

from pathlib import Path
from typing import Final

import numpy as np

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, Tokens, WindowReader

TOKENS_NAME: Final = "tokens.bin"


def make(tokens: Tokens, folder: Path) -> None:
    """Writes the ids of all windows."""
    with (folder / TOKENS_NAME).open("wb") as stream:
        for block in tokens.blocks():
            stream.write(block.tobytes())


def open_windows(folder: Path) -> WindowReader:
    """Slices of the map."""
    ids = np.memmap(folder / TOKENS_NAME, dtype=np.uint16, mode="r")

    def window(number: int) -> IntArray:
        start = number * WINDOW_TOKENS
        return ids[start : start + WINDOW_TOKENS].astype(np.int64)

    return window
