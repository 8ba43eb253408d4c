"""mosaicml-streaming: MDS samples of 2,049 ids in a local folder, as map-style samples."""

from pathlib import Path
from typing import Final

import numpy as np
import streaming
from streaming.base.util import clean_stale_shared_memory

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, Tokens, WindowReader

_COLUMN: Final = "tokens"


def make(tokens: Tokens, folder: Path) -> None:
    """Writes uncompressed MDS shards."""
    columns = {_COLUMN: f"ndarray:uint16:{WINDOW_TOKENS}"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for block in tokens.blocks():
            for row in block:
                writer.write({_COLUMN: row})


def open_windows(folder: Path) -> WindowReader:
    """Samples by number."""
    # A run that was killed leaves names in /dev/shm at which the next one stops.
    clean_stale_shared_memory()
    samples = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)

    def window(number: int) -> IntArray:
        found: IntArray = samples[number][_COLUMN].astype(np.int64)
        return found

    return window
