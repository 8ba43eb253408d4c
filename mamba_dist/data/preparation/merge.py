"""The finished parts, in the order of their units, into shards and the lists beside them.

The order of the units is that of the corpus, so the bytes do not depend on the number of workers or
tasks, or on where an earlier run was killed.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mamba_dist.data.document_ids import DOCUMENT_IDS_NAME, write_document_ids
from mamba_dist.data.durable import hash_file, write_durably
from mamba_dist.data.manifest import (
    BuildSettings,
    DuplicateSummary,
    InputSummary,
    Manifest,
    TokenizerIdentity,
)
from mamba_dist.data.preparation.deduplication import first_occurrences
from mamba_dist.data.preparation.documents import BadDocument
from mamba_dist.data.preparation.input_lists import write_lists
from mamba_dist.data.preparation.part_records import PartBlock, PartRecord, read_keys, read_part
from mamba_dist.data.preparation.staging import BuildPlan, Staging
from mamba_dist.data.shard import schema_metadata, token_dtype
from mamba_dist.data.shard_index import SPLITS, ShardRecord
from mamba_dist.data.shard_writer import Documents, ShardWriter
from mamba_dist.errors import DataError

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
        shard cannot be written.
        ChangedPartError: a part changed since it was journalled.
    """
    settings = plan.settings
    if staging.shards.exists():
        shutil.rmtree(staging.shards)
    staging.shards.mkdir()
    lists = write_lists(staging.shards, staging.parts, records, files=plan.files)
    if sum(record.documents for record in records) == 0:
        staging.discard()
        raise DataError(_no_documents(records, lists.first))
    dtype = token_dtype(identity.vocab_size).name
    kept, duplicates = _choose_documents(staging, records) if settings.deduplicate else (None, None)
    shards = _write_shards(
        staging, records, settings=settings, identity=identity, dtype=dtype, kept=kept
    )
    if fault := _missing_split(shards, settings):
        staging.discard()
        raise DataError(fault)
    write_durably(staging.shards / tokenizer.name, tokenizer.read_bytes())
    ids_sha256 = _write_ids(staging, records, settings.id_field)
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
            bad_documents=lists.bad,
            text_bytes=sum(record.text_bytes for record in records),
            sha256=lists.inputs_sha256,
            ids_sha256=ids_sha256,
        ),
        shards=tuple(shards),
        backend=proofs[0] if proofs else None,
        more_backends=proofs[1:],
        duplicates=duplicates,
    )


def _missing_split(shards: Sequence[ShardRecord], settings: BuildSettings) -> str | None:
    """What is wrong if a split has no documents."""
    counts = {split: sum(s.documents for s in shards if s.split == split) for split in SPLITS}
    if min(counts.values()) > 0:
        return None
    return (
        f"the corpus has {sum(counts.values())} documents"
        f"{' of different texts' * settings.deduplicate}: {counts['train']} for training and "
        f"{counts['val']} for validation (chosen by content, {settings.train_split:g}/"
        f"{settings.val_split:g}), expected at least one each; give more documents or another "
        "--train-split"
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
        for block in read_part(staging.parts, record, dtype=dtype):
            end = first_doc_id + len(block.lengths)
            for number, writer in enumerate(writers):
                chosen = block.splits == number
                if kept is not None:
                    chosen &= kept[first_doc_id:end]
                writer.add(_documents_of(block, chosen, first_doc_id))
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


def _documents_of(block: PartBlock, chosen: Chosen, first_doc_id: int) -> Documents:
    if chosen.all() or not chosen.any():  # so that a mapped document is not copied
        ids = block.ids[: block.ids.size if chosen.all() else 0]
    else:
        ids = block.ids[np.repeat(chosen, block.lengths)]
    return Documents(
        ids=ids,
        lengths=block.lengths[chosen],
        doc_ids=(first_doc_id + np.flatnonzero(chosen)).astype(np.uint64),
    )


def _write_ids(staging: Staging, records: list[PartRecord], id_field: str | None) -> str | None:
    """The ids of the source, if they are to be kept; the sha256 of their file."""
    if id_field is None:
        return None
    notes = [(record.unit, record.ids_xxh3) for record in records]
    write_document_ids(staging.shards, staging.parts, notes, id_field=id_field)
    return hash_file(staging.shards / DOCUMENT_IDS_NAME).sha256


def _no_documents(records: list[PartRecord], first: BadDocument | None) -> str:
    files = sum(file.xxh3 is not None for record in records for file in record.files)
    counts = sum((Counter(record.faults) for record in records), Counter[str]())
    faults = ", ".join(f"{count} {fault}" for fault, count in counts.items())
    return (
        f"no usable document in {files} files ({faults or 'all files are empty'}); the first: "
        f"{first or records[0].files[0].name}"
    )
