"""manifest.json as version 1 had it: every shard and batch in the file itself, and no index."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamba_dist.data.manifest import Manifest
from mamba_dist.data.shard_index import INDEX_NAME

Change = Callable[[dict[str, Any]], object]


def write_version_1(folder: Path, manifest: Manifest, *, change: Change | None = None) -> None:
    """Makes a data set folder what version 1 would have left, then changed by hand."""
    shards = [{**vars(shard), "batches": list(shard.batches)} for shard in manifest.shards]
    content: dict[str, Any] = {
        "format_version": 1,
        "fingerprint": manifest.fingerprint,
        "tool_version": manifest.tool_version,
        "dtype": manifest.dtype,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "settings": dataclasses.asdict(manifest.settings),
        "inputs": dataclasses.asdict(manifest.inputs),
        "batch_xxh3": {s["file"]: [batch.xxh3 for batch in s["batches"]] for s in shards},
    }
    for shard in shards:
        shard["batches"] = [list(vars(batch).values())[:5] for batch in shard["batches"]]
    content["shards"] = shards
    if change is not None:
        change(content)
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))
    (folder / INDEX_NAME).unlink(missing_ok=True)
