"""The finished parts, in the order of their units, into shards and the lists beside them.

The order of the units is that of the corpus, so the bytes do not depend on the number of workers or
tasks, or on where an earlier run was killed.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.data.deduplication import first_occurrences
from mamba_dist.data.documents import BadDocument
from mamba_dist.data.durable import hash_file, write_durably
from mamba_dist.data.manifest import (
    BuildSettings,
    DuplicateSummary,
    InputSummary,
    Manifest,
    TokenizerIdentity,
)
from mamba_dist.data.parts import Part, PartRecord, read_keys, read_part
from mamba_dist.data.shard import schema_metadata, token_dtype
from mamba_dist.data.shard_index import SPLITS, ShardRecord
from mamba_dist.data.shard_writer import Documents, ShardWriter
from mamba_dist.data.staging import BAD_DOCUMENTS_NAME, INPUTS_NAME, BuildPlan, Staging
from mamba_dist.errors import DataError

_MERGE_TOKENS = 4 << 20

Chosen = npt.NDArray[np.bool_]


def merge_parts(
    plan: BuildPlan,
    staging: Staging,
    tokenizer: Path,
    *,
    records: list[PartRecord],
    identity: TokenizerIdentity,
) -> Manifest:
    """Everything a data set folder holds but its manifest, in `staging.shards`; the manifest.

    `records` are all units' in order.

    Raises:
        DataError: no documents, or too few for both splits (then the staging folder is gone); a
        part changed since it was journalled; a shard cannot be written.
    """
    settings = plan.settings
    if staging.shards.exists():
        shutil.rmtree(staging.shards)
    staging.shards.mkdir()
    inputs, bad = _write_lists(staging.shards, records)
    if sum(record.documents for record in records) == 0:
        staging.discard()
        raise DataError(_no_documents(records, bad))
    dtype = token_dtype(identity.vocab_size).name
    kept, duplicates = _choose_documents(staging, records) if settings.deduplicate else (None, None)
    shards = _write_shards(
        staging, records, settings=settings, identity=identity, dtype=dtype, kept=kept
    )
    counts = {split: sum(s.documents for s in shards if s.split == split) for split in SPLITS}
    if min(counts.values()) == 0:
        staging.discard()
        raise DataError(
            f"the corpus has {sum(counts.values())} documents"
            f"{' of different texts' * settings.deduplicate}: {counts['train']} for training and "
            f"{counts['val']} for validation (chosen by content, {settings.train_split:g}/"
            f"{settings.val_split:g}), expected at least one each; give more documents or another "
            "--train-split"
        )
    write_durably(staging.shards / tokenizer.name, tokenizer.read_bytes())
    proofs = staging.backends()
    return Manifest(
        tool_version=version("mamba-dist"),
        dtype=dtype,
        tokenizer=replace(identity, file=tokenizer.name),
        settings=settings,
        inputs=InputSummary(
            files=len(plan.files),
            bytes=sum(file.bytes for file in plan.files),
            documents=sum(record.documents for record in records),
            bad_documents=len(bad),
            text_bytes=sum(record.text_bytes for record in records),
            sha256=inputs,
        ),
        shards=tuple(shards),
        backend=proofs[0] if proofs else None,
        more_backends=proofs[1:],
        duplicates=duplicates,
    )


def _write_shards(
    staging: Staging,
    records: list[PartRecord],
    *,
    settings: BuildSettings,
    identity: TokenizerIdentity,
    dtype: str,
    kept: Chosen | None,
) -> list[ShardRecord]:
    """The shards of all splits, of the `kept` documents (None: all)."""
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
        end = first_doc_id + record.documents
        for number, writer in enumerate(writers):
            chosen = part.splits == number
            if kept is not None:
                chosen &= kept[first_doc_id:end]
            for documents in _documents_of(part, chosen, first_doc_id):
                writer.add(documents)
        first_doc_id = end
    return [shard for writer in writers for shard in writer.finish()]


def _choose_documents(
    staging: Staging, records: list[PartRecord]
) -> tuple[Chosen, DuplicateSummary]:
    """The documents that stay when duplicates go, and what goes."""
    total = sum(record.documents for record in records)
    upper, lower = np.empty(total, dtype=np.uint64), np.empty(total, dtype=np.uint64)
    ends = list(itertools.accumulate(record.documents for record in records))
    for record, end in zip(records, ends, strict=True):
        begin = end - record.documents
        upper[begin:end], lower[begin:end], _ = read_keys(staging.parts, record).T
    kept = first_occurrences(upper, lower)
    text_bytes = 0
    for record, end in zip(records, ends, strict=True):
        here = kept[end - record.documents : end]
        if not here.all():
            text_bytes += int(read_keys(staging.parts, record)[~here, 2].sum())
    return kept, DuplicateSummary(total - int(kept.sum()), text_bytes)


def _documents_of(part: Part, chosen: Chosen, first_doc_id: int) -> Iterator[Documents]:
    ends = np.cumsum(part.lengths)
    start = 0
    while start < len(ends):
        begin = int(ends[start] - part.lengths[start])
        stop = max(start + 1, int(np.searchsorted(ends, begin + _MERGE_TOKENS, side="right")))
        here = chosen[start:stop]
        lengths = part.lengths[start:stop]
        ids = np.asarray(part.ids[begin : int(ends[stop - 1])])
        yield Documents(
            ids=ids[np.repeat(here, lengths)],
            lengths=lengths[here],
            doc_ids=(first_doc_id + start + np.flatnonzero(here)).astype(np.uint64),
        )
        start = stop


def _write_lists(folder: Path, records: list[PartRecord]) -> tuple[str, list[BadDocument]]:
    lines, first = [], 0
    for record in records:
        for file in record.files:
            line = {
                "name": file.name,
                "bytes": file.bytes,
                "xxh3": file.xxh3,
                "documents": file.documents,
                "first_doc_id": first,
            }
            lines.append(json.dumps(line))
            first += file.documents
    write_durably(folder / INPUTS_NAME, "".join(line + "\n" for line in lines).encode())
    bad = [document for record in records for document in record.bad]
    listed = [json.dumps(vars(document)) + "\n" for document in bad]
    write_durably(folder / BAD_DOCUMENTS_NAME, "".join(listed).encode())
    return hash_file(folder / INPUTS_NAME).sha256, bad


def _no_documents(records: list[PartRecord], bad: list[BadDocument]) -> str:
    files = sum(len(record.files) for record in records)
    faults = ", ".join(f"{count} {fault}" for fault, count in Counter(b.fault for b in bad).items())
    return (
        f"no usable document in {files} files ({faults or 'all files are empty'}); the first: "
        f"{bad[0] if bad else records[0].files[0].name}"
    )
