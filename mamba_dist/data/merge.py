"""The finished parts, in the order of their units, into shards.

The order of the units is that of the corpus, so the bytes do not depend on the number of workers or
on where an earlier run was killed.
"""

import numpy as np

from mamba_dist.data.manifest import SPLITS, BuildSettings, ShardRecord, TokenizerIdentity
from mamba_dist.data.part_records import PartBlock, PartRecord, read_part
from mamba_dist.data.shard import schema_metadata
from mamba_dist.data.shard_writer import Documents, ShardWriter
from mamba_dist.data.staging import Staging


def write_shards(
    staging: Staging,
    records: list[PartRecord],
    *,
    settings: BuildSettings,
    identity: TokenizerIdentity,
    dtype: str,
) -> list[ShardRecord]:
    """The shards of all splits, written into `staging.shards` from the parts of `records`.

    Raises:
        DataError: a part changed since it was journalled, or a shard cannot be written.
    """
    writers = [
        ShardWriter(
            staging.shards,
            split,
            metadata=schema_metadata(
                split,
                dtype=dtype,
                tokenizer_sha256=identity.sha256,
                vocab_size=identity.vocab_size,
                eos_id=identity.eos_id,
            ),
            shard_bytes=settings.shard_bytes,
            batch_tokens=settings.batch_tokens,
        )
        for split in SPLITS
    ]
    first_doc_id = 0
    for record in records:
        for block in read_part(staging.parts, record, dtype=dtype):
            for number, writer in enumerate(writers):
                writer.add(_documents_of(block, number, first_doc_id))
            first_doc_id += len(block.lengths)
    return [shard for writer in writers for shard in writer.finish()]


def _documents_of(block: PartBlock, split: int, first_doc_id: int) -> Documents:
    chosen = block.splits == split
    if chosen.all() or not chosen.any():  # so that a mapped document is not copied
        ids = block.ids[: block.ids.size if chosen.all() else 0]
    else:
        ids = block.ids[np.repeat(chosen, block.lengths)]
    return Documents(
        ids=ids,
        lengths=block.lengths[chosen],
        doc_ids=(first_doc_id + np.flatnonzero(chosen)).astype(np.uint64),
    )
