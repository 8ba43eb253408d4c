"""manifest.json: what a data set folder holds. Written last, so a folder without it is not a data
set.

    DATASET/
        manifest.json            this file: small, whatever the data set's size
        index.npy                every shard and record batch (format: shard_index.py)
        train-00000.arrow …      shards of the training split (format: shard.py)
        val-00000.arrow …        shards of the validation split
        tokenizer.json|.model    copy of the tokenizer that made the ids
        inputs.jsonl             one line an input file: name, bytes, xxh3, format, first doc_id …
        bad_documents.jsonl      one line a document passed over: file, line, fault
        document_ids.arrow       the documents' ids in the source, if they are kept

Nothing here depends on the time or the number of workers; on the machine only which backend was
proven (`backend`, absent for the reference; where several machines had several, the others stand
in `more_backends`). With `deduplicate` in the settings (absent: no) a text's first document in the
order of the corpus is there alone: doc_ids count the others too, and `duplicates` says how many.

Version 1 had the shards in this file, and the hashes of their batches under `batch_xxh3`; it is
read as it is. The fingerprint rests on the shards' sha256 and is the same either way.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_dist.data.durable import write_durably
from mamba_dist.data.index_file import index_bytes, map_index
from mamba_dist.data.shard_index import (
    INDEX_NAME,
    SPLITS,
    BatchRecord,
    ShardIndex,
    ShardRecord,
    SplitTable,
    index_of,
)
from mamba_dist.errors import DataError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
INPUTS_NAME = "inputs.jsonl"
BAD_DOCUMENTS_NAME = "bad_documents.jsonl"
DEFAULT_MAX_RECORD_BYTES = 16 << 20
"""The longest JSON line or table cell that is read, for it has to be in memory at once."""
# Enters every fingerprint; the format may change without the data becoming other data.
_FINGERPRINT_VERSION = 1


@dataclass(frozen=True)
class Probe:
    """A fixed text and the ids it had, to notice a tokenizer or library that encodes otherwise."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids. `vocab_size` is the largest id plus one."""

    kind: str
    file: str
    sha256: str
    vocab_size: int
    eos_token: str
    eos_id: int
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class BuildSettings:
    """Everything besides the inputs that determines the bytes of the shards.

    `tokenizer` is the sha256 of the file given, or "trained: N" for one trained on the corpus
    itself.
    """

    tokenizer: str
    eos_token: str | None
    text_field: str
    train_split: float
    val_split: float
    shard_bytes: int
    batch_tokens: int
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    id_field: str | None = None
    deduplicate: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it is written. What has its default is absent, so that data sets and unfinished builds
        of older versions are known again, and older programs read newer data sets.
        """
        content = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if content[field.name] == field.default:
                del content[field.name]
        return content


@dataclass(frozen=True)
class InputSummary:
    """What went in, duplicates included; the single files stand in inputs.jsonl.

    `sha256` is of that list, `ids_sha256` of document_ids.arrow, None if the source's ids are not
    kept.
    """

    files: int
    bytes: int
    documents: int
    bad_documents: int
    text_bytes: int
    sha256: str
    ids_sha256: str | None = None


@dataclass(frozen=True)
class DuplicateSummary:
    """What was left out since its text stands in the corpus before."""

    documents: int
    text_bytes: int


@dataclass(frozen=True)
class BackendProof:
    """The fast backend that encoded, and what it was compared with `reference` on, all ids equal.

    It is no part of the fingerprint: the ids are the reference's.
    """

    name: str
    version: str
    reference: str
    adversarial_texts: int
    corpus_documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The whole record of a data set; `shards` are listed split by split."""

    tool_version: str
    dtype: str
    tokenizer: TokenizerIdentity
    settings: BuildSettings
    inputs: InputSummary
    shards: Sequence[ShardRecord]
    backend: BackendProof | None = None
    more_backends: tuple[BackendProof, ...] = ()
    duplicates: DuplicateSummary | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", index_of(self.shards))

    @property
    def index(self) -> ShardIndex:
        """The shards as a table that is read where it is asked."""
        assert isinstance(self.shards, ShardIndex)
        return self.shards

    @property
    def fingerprint(self) -> str:
        """A hash that differs if any token, its order, its split or its meaning differs."""
        known = self.index.known_fingerprint
        if known is not None and known[0] == self._meaning():
            return known[1]
        return self.computed_fingerprint()

    def computed_fingerprint(self) -> str:
        """The fingerprint, from every shard's record, whatever the file says of it."""
        shards = [[s.split, s.documents, s.tokens, s.sha256] for s in self.shards]
        content = [_FINGERPRINT_VERSION, *self._meaning(), shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _meaning(self) -> list[object]:
        tokenizer = self.tokenizer
        return [
            self.dtype,
            [tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id],
            [self.settings.train_split, self.settings.val_split],
        ]

    def shards_of(self, split: str) -> SplitTable:
        """The shards of one split, in reading order."""
        return self.index.split(split)

    def tokens(self, split: str) -> int:
        """Tokens of one split, each document's EOS included."""
        return self.shards_of(split).tokens

    def documents(self, split: str) -> int:
        """Documents of one split."""
        return self.shards_of(split).documents


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes index.npy, then manifest.json atomically; from then on the folder is a data set.

    Raises:
        DataError: the index was read from a file, and is damaged there.
    """
    index = index_bytes(manifest.index, manifest.fingerprint)
    write_durably(folder / INDEX_NAME, index)
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        **_plain_fields(manifest),
        "settings": manifest.settings.to_json(),
    }
    content["splits"] = {split: _counts(manifest.shards_of(split)) for split in SPLITS}
    content["index_sha256"] = hashlib.sha256(index).hexdigest()
    content["content_sha256"] = _content_hash(content)
    write_durably(folder / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())


def _plain_fields(manifest: Manifest) -> dict[str, Any]:
    """All that a manifest has but its shards, for JSON; what is absent is left out."""
    values = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name != "shards"
    }
    return {name: _plain(value) for name, value in values.items() if value not in (None, ())}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.asdict(value)
        return {name: one for name, one in fields.items() if one is not None}
    return value


def _counts(table: SplitTable) -> dict[str, int]:
    return {
        "shards": len(table),
        "batches": table.batches,
        "documents": table.documents,
        "tokens": table.tokens,
        "bytes": table.bytes,
    }


def _content_hash(content: dict[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "content_sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set folder, its index mapped.

    Raises:
        DataError: there is none, it is damaged, or of a newer format.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}, so it is no (finished) data set; write it by "
            f"`python data_prep/tokenize.py CORPUS --output {folder}`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; tokenize again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in range(1, FORMAT_VERSION + 1):
        raise DataError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; "
            "update the program or tokenize again"
        )
    try:
        index = _parse_shards(content) if version == 1 else _map_shards(folder, content)
        manifest = _parse(content, index)
        is_whole = (
            manifest.fingerprint == content.get("fingerprint")
            if version == 1
            else content["content_sha256"] == _content_hash(content)
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); tokenize again"
        ) from error
    if not is_whole:
        raise DataError(
            f"{path} was changed by hand: its content does not give the hash that stands in it; "
            "tokenize again"
        )
    if version == 1:
        return manifest
    index.known_fingerprint = (manifest._meaning(), content["fingerprint"])
    return manifest


def check_splits(manifest: Manifest, *, train_split: float, val_split: float) -> None:
    """Nothing, if the data set was split as asked.

    Raises:
        DataError: it was split otherwise.
    """
    made = (manifest.settings.train_split, manifest.settings.val_split)
    if max(abs(made[0] - train_split), abs(made[1] - val_split)) > 1e-6:
        raise DataError(
            f"the data set was split {made[0]:g}/{made[1]:g} (train/val), the config asks for "
            f"{train_split:g}/{val_split:g}; set data.train_split and data.val_split to what was "
            "used, or tokenize again with --overwrite"
        )


def check_vocabulary(manifest: Manifest, vocab_size: int) -> None:
    """Nothing, if a model of `vocab_size` embeds every id of the data set.

    Raises:
        DataError: the tokenizer has more ids.
    """
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the data set's tokenizer has {manifest.tokenizer.vocab_size} ids, model.vocab_size "
            f"is {vocab_size}; set model.vocab_size to at least {manifest.tokenizer.vocab_size}"
        )


def _parse(content: dict[str, Any], index: ShardIndex) -> Manifest:
    tokenizer = dict(content["tokenizer"])
    tokenizer["probes"] = tuple(Probe(p["text"], tuple(p["ids"])) for p in tokenizer["probes"])
    return Manifest(
        tool_version=content["tool_version"],
        dtype=content["dtype"],
        tokenizer=TokenizerIdentity(**tokenizer),
        settings=BuildSettings(**content["settings"]),
        inputs=InputSummary(**content["inputs"]),
        shards=index,
        backend=BackendProof(**content["backend"]) if "backend" in content else None,
        duplicates=DuplicateSummary(**content["duplicates"]) if "duplicates" in content else None,
        more_backends=tuple(BackendProof(**proof) for proof in content.get("more_backends", [])),
    )


def _map_shards(folder: Path, content: dict[str, Any]) -> ShardIndex:
    counts = [content["splits"][split] for split in SPLITS]
    index = map_index(
        folder,
        [(int(one["shards"]), int(one["batches"])) for one in counts],
        fingerprint=str(content["fingerprint"]),
        sha256=content["index_sha256"],
    )
    for split, expected in zip(SPLITS, counts, strict=True):
        for name in ("documents", "tokens"):
            if (found := getattr(index.split(split), name)) != expected[name]:
                raise ValueError(f"{INDEX_NAME} has {found} {split} {name}, not {expected[name]}")
    return index


def _parse_shards(content: dict[str, Any]) -> ShardIndex:
    """The shards of version 1, which stand in the manifest itself."""
    batch_hashes = dict(content.get("batch_xxh3", {}))
    shards = []
    for shard in content["shards"]:
        known = batch_hashes.get(shard["file"], [None] * len(shard["batches"]))
        batches = tuple(
            _parse_batch(*map(int, batch), xxh3=xxh3)
            for batch, xxh3 in zip(shard["batches"], known, strict=True)
        )
        shards.append(ShardRecord(**{**shard, "batches": batches}))
    return index_of(shards)


def _parse_batch(
    documents: int,
    tokens: int,
    offsets_at: int,
    values_at: int,
    doc_ids_at: int,
    *,
    xxh3: str | None,
) -> BatchRecord:
    return BatchRecord(documents, tokens, offsets_at, values_at, doc_ids_at, xxh3)
