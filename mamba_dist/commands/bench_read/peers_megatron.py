"""As Megatron-LM reads: `.bin` ids, `.idx` lengths and byte offsets of documents, and the sample
index that GPTDataset builds over them when a training starts for the first time, here by one numpy
search instead of its C++ loop, with documents and samples in their own order.

Format and steps: megatron/core/datasets/{indexed_dataset,gpt_dataset}.py, written anew.
"""

from pathlib import Path
from typing import Final

import numpy as np

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, Tokens, WindowReader

_IDS: Final = "tokens.bin"
_INDEX: Final = "tokens.idx"


def make(tokens: Tokens, folder: Path) -> None:
    """Writes ids and index."""
    with (folder / _IDS).open("wb") as stream:
        for block in tokens.blocks():
            stream.write(block.tobytes())
    lengths = tokens.document_lengths()
    offsets = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * np.dtype(np.uint16).itemsize
    with (folder / _INDEX).open("wb") as stream:
        stream.write(np.array([len(lengths)], dtype=np.int64).tobytes())
        stream.write(offsets.tobytes())
        stream.write(lengths.tobytes())


def open_windows(folder: Path) -> WindowReader:
    """Pieces of documents, joined."""
    index = np.memmap(folder / _INDEX, mode="r")
    documents = int(index[:8].view(np.int64)[0])
    offsets = index[8 : 8 + 8 * documents].view(np.int64)
    lengths = index[8 + 8 * documents :].view(np.int32)
    ids = memoryview(np.memmap(folder / _IDS, mode="r"))  # type: ignore[arg-type]
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = np.arange(int(ends[-1]) // WINDOW_TOKENS + 1) * WINDOW_TOKENS
    document_of = np.searchsorted(ends, borders, side="right").clip(max=documents - 1)
    within = borders - (ends[document_of] - lengths[document_of])

    def window(number: int) -> IntArray:
        first, last = int(document_of[number]), int(document_of[number + 1])
        pieces = []
        for document in range(first, last + 1):
            begin = int(within[number]) if document == first else 0
            end = int(within[number + 1]) if document == last else int(lengths[document])
            at = int(offsets[document]) + 2 * begin
            pieces.append(np.frombuffer(ids, dtype=np.uint16, count=end - begin, offset=at))
        return np.concatenate(pieces).astype(np.int64)

    return window
