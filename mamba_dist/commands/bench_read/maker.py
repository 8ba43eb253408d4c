"""Makes the files of one variant: `python -m mamba_dist.commands.bench_read.maker VARIANT SOURCE
FOLDER TOKENS SPARSE`. Prints one line of JSON: `absent`, why there are none, or nothing in it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mamba_dist.commands.bench_read import peers_megatron, peers_memmap
from mamba_dist.commands.bench_read.sets import (
    SetTokens,
    make_set,
    make_sparse_set,
    write_sparse_file,
)
from mamba_dist.commands.bench_read.spec import (
    DATASETS,
    LITDATA,
    MEGATRON,
    MEMMAP,
    OURS,
    STREAMING,
    Peer,
)
from mamba_dist.errors import MambaDistError


def main(variant: str, source: Path, folder: Path, *, tokens: int, sparse: bool) -> dict[str, Any]:
    """What is printed; `source` is the folder of ours."""
    try:
        if variant == OURS:
            (make_sparse_set if sparse else make_set)(folder, tokens)
        elif sparse and variant == MEMMAP:
            write_sparse_file(source, folder / peers_memmap.TOKENS_NAME)
        else:
            _peer(variant).make(SetTokens(source), folder)
    except (ImportError, MambaDistError) as error:
        return {"absent": str(error)}
    return {}


def _peer(variant: str) -> Peer:
    if variant == MEGATRON:
        return peers_megatron
    if variant == DATASETS:
        from mamba_dist.commands.bench_read import peers_datasets

        return peers_datasets
    if variant == STREAMING:
        from mamba_dist.commands.bench_read import peers_streaming

        return peers_streaming
    if variant == LITDATA:
        from mamba_dist.commands.bench_read import peers_litdata

        return peers_litdata
    return peers_memmap


if __name__ == "__main__":
    name, given_source, given_folder, count, holes = sys.argv[1:]
    print(
        json.dumps(
            main(
                name,
                Path(given_source),
                Path(given_folder),
                tokens=int(count),
                sparse=holes == "True",
            )
        )
    )
