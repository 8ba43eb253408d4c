"""Our own shards read by pyarrow as its users do: map, open, and take every record batch."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS, IntArray, WindowReader


def open_windows(folder: Path) -> WindowReader:
    """Slices of the batches' values."""
    values = []
    for path in sorted(folder.glob("train-*.arrow")):
        shard = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [shard.get_batch(index) for index in range(shard.num_record_batches)]
        values += [batch.column("tokens").values.to_numpy() for batch in batches]
    ends = list(accumulate(map(len, values)))

    def window(number: int) -> IntArray:
        start = number * WINDOW_TOKENS
        stop = start + WINDOW_TOKENS
        pieces = []
        batch = bisect_right(ends, start)
        while start < stop:
            end = min(stop, ends[batch])
            first = start - ends[batch] + len(values[batch])
            pieces.append(values[batch][first : first + end - start])
            start, batch = end, batch + 1
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole.astype(np.int64)

    return window
