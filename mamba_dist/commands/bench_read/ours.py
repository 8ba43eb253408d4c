"""Our own reading, with where documents begin, as training reads."""

from pathlib import Path

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, WindowReader
from mamba_dist.data.dataset import open_dataset


def open_windows(folder: Path) -> WindowReader:
    """Windows of the training split."""
    stream = open_dataset(folder).train

    def window(number: int) -> IntArray:
        start = number * WINDOW_TOKENS
        return stream.read(start, start + WINDOW_TOKENS)[0]

    return window
