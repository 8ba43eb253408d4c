"""The finished parts, in the order of their units, into shards.

The order of the units is that of the corpus, so the bytes do not depend on the number of workers or
on where an earlier run was killed.
"""

from collections.abc import Iterator

import numpy as np

from mamba_dist.data.manifest import BuildSettings, TokenizerIdentity
from mamba_dist.data.parts import Part, PartRecord, read_part
from mamba_dist.data.shard import schema_metadata
from mamba_dist.data.shard_index import SPLITS, ShardRecord
from mamba_dist.data.shard_writer import Documents, ShardWriter
from mamba_dist.data.staging import Staging

_MERGE_TOKENS = 4 << 20


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
        part = read_part(staging.parts, record, dtype=dtype)
        for number, writer in enumerate(writers):
            for documents in _documents_of(part, number, first_doc_id):
                writer.add(documents)
        first_doc_id += record.documents
    return [shard for writer in writers for shard in writer.finish()]


def _documents_of(part: Part, split: int, first_doc_id: int) -> Iterator[Documents]:
    ends = np.cumsum(part.lengths)
    start = 0
    while start < len(ends):
        begin = int(ends[start] - part.lengths[start])
        stop = max(start + 1, int(np.searchsorted(ends, begin + _MERGE_TOKENS, side="right")))
        chosen = part.splits[start:stop] == split
        lengths = part.lengths[start:stop]
        ids = np.asarray(part.ids[begin : int(ends[stop - 1])])
        yield Documents(
            ids=ids[np.repeat(chosen, lengths)],
            lengths=lengths[chosen],
            doc_ids=(first_doc_id + start + np.flatnonzero(chosen)).astype(np.uint64),
        )
        start = stop
