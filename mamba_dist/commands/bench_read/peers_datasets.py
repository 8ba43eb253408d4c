"""Hugging Face datasets: rows of 2,049 ids, saved to disk and mapped, as numpy arrays."""

from pathlib import Path
from typing import Any, Final

import datasets
import numpy as np

from mamba_dist.commands.bench_read.spec import IntArray, Tokens, WindowReader

_COLUMN: Final = "input_ids"


def make(tokens: Tokens, folder: Path) -> None:
    """Saves a set of rows."""
    datasets.disable_progress_bars()
    features = datasets.Features({_COLUMN: datasets.Sequence(datasets.Value("uint16"))})
    parts = [
        datasets.Dataset.from_dict({_COLUMN: list(block)}, features=features)
        for block in tokens.blocks()
    ]
    datasets.concatenate_datasets(parts).save_to_disk(str(folder))


def open_windows(folder: Path) -> WindowReader:
    """Rows of the saved set."""
    rows: Any = datasets.load_from_disk(str(folder)).with_format("numpy")

    def window(number: int) -> IntArray:
        found: IntArray = rows[number][_COLUMN].astype(np.int64)
        return found

    return window
