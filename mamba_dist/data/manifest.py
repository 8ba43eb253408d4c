"""manifest.json: what a data set folder holds. Written last, so a folder without it is not a data
set.

    DATASET/
        manifest.json            this file
        train-00000.arrow …      shards of the training split (format: shard.py)
        val-00000.arrow …        shards of the validation split
        tokenizer.json|.model    copy of the tokenizer that made the ids
        inputs.jsonl             one line an input file: name, bytes, xxh3, documents, first doc_id
        bad_documents.jsonl      one line a document passed over: file, line, fault
        document_ids.arrow       the documents' ids in the source, if they are kept

Nothing here depends on the time or the number of workers; on the machine only which backend was
proven (`backend`, absent for the reference; where several machines had several, the others stand
in `more_backends`). With `deduplicate` in the settings (absent: no) a text's first document in the
order of the corpus is there alone: doc_ids count the others too, and `duplicates` says how many.

The hashes of single batches stand beside the shards, under `batch_xxh3`: a program that does not
know them passes over them, and a data set written before them is read without. They tell where a
shard is damaged; the fingerprint rests on the shards' sha256 alone, and is the same either way.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_dist.data.durable import write_durably
from mamba_dist.data.sources import DEFAULT_MAX_RECORD_BYTES
from mamba_dist.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")


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
class BatchRecord:
    """One record batch of a shard; the offsets are bytes from the beginning of the file.

    `xxh3` covers the bytes from the end of the batch before (the file's beginning for the first) to
    the end of this one's last buffer. None: written before such hashes were kept.
    """

    documents: int
    tokens: int
    offsets_at: int
    values_at: int
    doc_ids_at: int
    xxh3: str | None = None


@dataclass(frozen=True)
class ShardRecord:
    """One Arrow file."""

    split: str
    file: str
    bytes: int
    documents: int
    tokens: int
    xxh3: str
    sha256: str
    batches: tuple[BatchRecord, ...]


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
    """The whole record of a data set."""

    tool_version: str
    dtype: str
    tokenizer: TokenizerIdentity
    settings: BuildSettings
    inputs: InputSummary
    shards: tuple[ShardRecord, ...]
    backend: BackendProof | None = None
    more_backends: tuple[BackendProof, ...] = ()
    duplicates: DuplicateSummary | None = None

    @property
    def fingerprint(self) -> str:
        """A hash that differs if any token, its order, its split or its meaning differs."""
        shards = [[s.split, s.documents, s.tokens, s.sha256] for s in self.shards]
        tokenizer = self.tokenizer
        content = [
            FORMAT_VERSION,
            self.dtype,
            [tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id],
            [self.settings.train_split, self.settings.val_split],
            shards,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def shards_of(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of one split, in reading order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def tokens(self, split: str) -> int:
        """Tokens of one split, each document's EOS included."""
        return sum(shard.tokens for shard in self.shards_of(split))

    def documents(self, split: str) -> int:
        """Documents of one split."""
        return sum(shard.documents for shard in self.shards_of(split))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json atomically; from then on the folder is a data set."""
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        **dataclasses.asdict(manifest),
        "settings": manifest.settings.to_json(),
    }
    if manifest.backend is None:
        del content["backend"]
    if manifest.inputs.ids_sha256 is None:
        del content["inputs"]["ids_sha256"]
    if manifest.duplicates is None:
        del content["duplicates"]
    if not manifest.more_backends:
        del content["more_backends"]
    for shard in content["shards"]:
        hashes = [batch.pop("xxh3") for batch in shard["batches"]]
        if None not in hashes:
            content.setdefault("batch_xxh3", {})[shard["file"]] = hashes
        # One short line a batch: a large data set has many thousands.
        shard["batches"] = [list(batch.values()) for batch in shard["batches"]]
    write_durably(folder / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set folder.

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
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}; update the "
            "program or tokenize again"
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); tokenize again"
        ) from error
    if manifest.fingerprint != content.get("fingerprint"):
        raise DataError(
            f"{path} was changed by hand: its fingerprint is {content.get('fingerprint')}, its "
            f"content gives {manifest.fingerprint}; tokenize again"
        )
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


def _parse(content: dict[str, Any]) -> Manifest:
    tokenizer = dict(content["tokenizer"])
    tokenizer["probes"] = tuple(Probe(p["text"], tuple(p["ids"])) for p in tokenizer["probes"])
    batch_hashes = dict(content.get("batch_xxh3", {}))
    return Manifest(
        tool_version=content["tool_version"],
        dtype=content["dtype"],
        tokenizer=TokenizerIdentity(**tokenizer),
        settings=BuildSettings(**content["settings"]),
        inputs=InputSummary(**content["inputs"]),
        shards=tuple(
            _parse_shard(shard, batch_hashes.get(shard["file"])) for shard in content["shards"]
        ),
        backend=BackendProof(**content["backend"]) if "backend" in content else None,
        duplicates=DuplicateSummary(**content["duplicates"]) if "duplicates" in content else None,
        more_backends=tuple(BackendProof(**proof) for proof in content.get("more_backends", [])),
    )


def _parse_shard(content: dict[str, Any], hashes: list[str] | None) -> ShardRecord:
    known = hashes if hashes is not None else [None] * len(content["batches"])
    batches = tuple(
        _parse_batch(*map(int, batch), xxh3=xxh3)
        for batch, xxh3 in zip(content["batches"], known, strict=True)
    )
    shard = ShardRecord(**{**content, "batches": batches})
    if shard.split not in SPLITS or Path(shard.file).name != shard.file:
        raise ValueError(f"shard {shard.file!r} of split {shard.split!r}")
    if sum(b.tokens for b in batches) != shard.tokens:
        raise ValueError(f"the batches of {shard.file} do not add up to {shard.tokens} tokens")
    return shard


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
