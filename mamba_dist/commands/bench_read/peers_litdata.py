"""litdata: chunks of tokens in a local folder through `TokensLoader`, as LitGPT uses it."""

from pathlib import Path
from typing import Final

import litdata
import numpy as np
import torch
from litdata.streaming.cache import Cache

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, Tokens, WindowReader

# LitGPT's: 8,192 blocks a chunk.
_CHUNK_TOKENS: Final = WINDOW_TOKENS * 8192


def make(tokens: Tokens, folder: Path) -> None:
    """Writes chunks as `litdata.optimize` does in one worker."""
    cache = Cache(
        str(folder), chunk_size=_CHUNK_TOKENS, item_loader=litdata.TokensLoader(WINDOW_TOKENS)
    )
    number = 0
    for block in tokens.blocks():
        for row in block:
            cache[number] = torch.from_numpy(row.copy())
            number += 1
    cache.done()
    cache.merge()


def open_windows(folder: Path) -> WindowReader:
    """Blocks by number."""
    blocks = litdata.StreamingDataset(
        str(folder), item_loader=litdata.TokensLoader(WINDOW_TOKENS), shuffle=False
    )

    def window(number: int) -> IntArray:
        found: IntArray = blocks[number].numpy().astype(np.int64)
        return found

    return window
