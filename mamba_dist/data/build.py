"""From a corpus to a data set: plan, tokenise units in workers, merge the parts, publish."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import xxhash

from mamba_dist.data.documents import BadDocument, read_documents
from mamba_dist.data.durable import exclusive_lock, hash_file, sync_folder, write_durably
from mamba_dist.data.fast_backends import REFERENCE, Encoder, use_one_thread
from mamba_dist.data.manifest import (
    MANIFEST_NAME,
    BuildSettings,
    InputSummary,
    Manifest,
    read_manifest,
    write_manifest,
)
from mamba_dist.data.merge import write_shards
from mamba_dist.data.parity import BackendChoice, choose_backend
from mamba_dist.data.parts import PartRecord, PartSettings, make_part, tokenize_units
from mamba_dist.data.shard import token_dtype
from mamba_dist.data.shard_index import SPLITS
from mamba_dist.data.sources import Corpus, InputFile, Unit, cut_units
from mamba_dist.data.staging import (
    BAD_DOCUMENTS_NAME,
    INPUTS_NAME,
    BuildPlan,
    Staging,
    check_same_build,
    open_staging,
    publish,
)
from mamba_dist.data.tokenization import (
    Tokenizer,
    dataset_file_name,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from mamba_dist.data.workers import distribute, start_workers, stop_workers
from mamba_dist.errors import DataError

DEFAULT_MAX_BAD = 100
_NAMED_BAD = 5


@dataclass(frozen=True)
class BuildRequest:
    """What a user asks for.

    Exactly one of `tokenizer` (a file) and `train_vocab_size` (train on the corpus, reading about
    `sample_bytes` of it) is given. More than `max_bad` bad documents stop the build; empty ones are
    only counted, since source trees are full of empty files. `backend` is as in `choose_backend`.
    """

    output: Path
    corpus: Corpus
    tokenizer: Path | None
    train_vocab_size: int | None
    train_split: float = 0.9
    val_split: float = 0.1
    eos_token: str | None = None
    text_field: str = "text"
    workers: int = 1
    batch_documents: int = 1000
    max_bad: int = DEFAULT_MAX_BAD
    overwrite: bool = False
    sample_bytes: int = 200 << 20
    unit_bytes: int = 2 << 20
    shard_bytes: int = 512 << 20
    batch_tokens: int = 8 << 20
    backend: str = REFERENCE


@dataclass(frozen=True)
class BuildResult:
    """A finished data set. `was_complete`: nothing had to be done."""

    manifest: Manifest
    was_complete: bool


class BuildListener(Protocol):
    """Hears how a build goes on."""

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        """Before the first unit; `done_bytes` were done by an earlier run."""

    def advanced(self, unit: Unit, record: PartRecord) -> None:
        """After each unit."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""


def build_dataset(request: BuildRequest, listener: BuildListener) -> BuildResult:
    """The data set at `request.output`: made, continued, or found complete.

    Raises:
        DataError: see the messages; until the last moment the folder holds no manifest, or the
        older one.
    """
    try:
        return _build(request, listener)
    except OSError as error:
        raise DataError(
            f"{error.filename or request.output}: {error.strerror or error}; mend that and run the "
            "same command again to continue"
        ) from error


def _build(request: BuildRequest, listener: BuildListener) -> BuildResult:
    # Loading it first: a wrong file is reported before anything is written.
    given = _load(request, request.tokenizer) if request.tokenizer is not None else None
    plan = _plan(request)
    request.output.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(request.output):
        if (request.output / MANIFEST_NAME).exists() and not request.overwrite:
            manifest = read_manifest(request.output)
            check_same_build(request.output, manifest, plan=plan)
            return BuildResult(manifest, was_complete=True)
        staging = open_staging(request.output, plan, overwrite=request.overwrite)
        path = _stage_tokenizer(request, staging, listener)
        tokenizer = given or _load(request, path)
        records = _make_parts(request, staging, path, tokenizer=tokenizer, listener=listener)
        manifest = _merge(request, plan, staging, path, records=records, tokenizer=tokenizer)
        names = [shard.file for shard in manifest.shards]
        names += [INPUTS_NAME, BAD_DOCUMENTS_NAME, path.name]
        publish(request.output, staging, names=names)
        sync_folder(request.output)
        write_manifest(request.output, manifest)
        staging.discard()
        return BuildResult(manifest, was_complete=False)


def sample_texts(
    files: Iterable[InputFile], *, text_field: str, sample_bytes: int, total_bytes: int
) -> Iterator[str]:
    """The texts of good documents, about `sample_bytes` of them, chosen by their content."""
    limit = 2**64 if total_bytes <= sample_bytes else int(2**64 * sample_bytes / total_bytes)
    for file in files:
        for document in read_documents(file, text_field):
            if isinstance(document, BadDocument):
                continue
            if limit == 2**64 or xxhash.xxh3_64_intdigest(document.text.encode()) < limit:
                yield document.text


def _load(request: BuildRequest, path: Path) -> Tokenizer:
    return load_tokenizer(path, eos_token=request.eos_token)


def _plan(request: BuildRequest) -> BuildPlan:
    if request.tokenizer is not None:
        tokenizer = hash_file(request.tokenizer).sha256
    else:
        tokenizer = f"trained: {request.train_vocab_size}"
    settings = BuildSettings(
        tokenizer=tokenizer,
        eos_token=request.eos_token,
        text_field=request.text_field,
        train_split=request.train_split,
        val_split=request.val_split,
        shard_bytes=request.shard_bytes,
        batch_tokens=request.batch_tokens,
    )
    return BuildPlan(settings, request.unit_bytes, request.corpus.files)


def _stage_tokenizer(request: BuildRequest, staging: Staging, listener: BuildListener) -> Path:
    if request.tokenizer is not None:
        path = staging.folder / dataset_file_name(request.tokenizer)
        write_durably(path, request.tokenizer.read_bytes())
        return path
    path = staging.folder / "tokenizer.json"
    if not path.exists():
        assert request.train_vocab_size is not None
        listener.notice(f"training a byte-level BPE tokenizer of {request.train_vocab_size} ids")
        texts = sample_texts(
            request.corpus.files,
            text_field=request.text_field,
            sample_bytes=request.sample_bytes,
            total_bytes=request.corpus.bytes,
        )
        save_tokenizer(path, train_bpe(texts, vocab_size=request.train_vocab_size))
    return path


def _make_parts(
    request: BuildRequest,
    staging: Staging,
    path: Path,
    *,
    tokenizer: Tokenizer,
    listener: BuildListener,
) -> list[PartRecord]:
    units = cut_units(request.corpus.files, unit_bytes=request.unit_bytes)
    finished = staging.finished()
    todo = [unit for unit in units if unit.index not in finished]
    if request.workers == 1:
        use_one_thread()
    wanted = request if todo else replace(request, backend=REFERENCE)
    choice = _choose(wanted, path, reference=tokenizer, listener=listener)
    if choice.proof is not None:
        staging.note_backend(choice.proof)
    settings = PartSettings(
        folder=str(staging.parts),
        tokenizer=str(path),
        eos_token=tokenizer.eos_token,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        text_field=request.text_field,
        train_split=request.train_split,
        batch_documents=request.batch_documents,
        backend=choice.name,
    )
    done_bytes = sum(unit.bytes for unit in units if unit.index in finished)
    listener.started(total_bytes=request.corpus.bytes, done_bytes=done_bytes)
    bad = [document for record in finished.values() for document in _bad_of(record)]
    _check_bad(bad, request.max_bad)
    for record in _records(request.workers, todo, settings, encoder=choice.encoder):
        staging.commit(record)
        finished[record.unit] = record
        listener.advanced(units[record.unit], record)
        bad += _bad_of(record)
        _check_bad(bad, request.max_bad)
    return [finished[unit.index] for unit in units]


def _records(
    workers: int, todo: list[Unit], settings: PartSettings, *, encoder: Encoder
) -> Iterator[PartRecord]:
    """Makes the parts, in any order."""
    if workers == 1:
        # Here, since a process more would import and load everything again: half a second.
        for unit in todo:
            yield make_part(unit, settings, encoder=encoder)
        return
    started = start_workers(tokenize_units, [settings] * min(workers, len(todo)))
    try:
        yield from distribute(started, todo)
    finally:
        stop_workers(started)


def _choose(
    request: BuildRequest, path: Path, *, reference: Tokenizer, listener: BuildListener
) -> BackendChoice:
    choice = choose_backend(
        request.backend,
        path,
        reference=reference,
        corpus=request.corpus,
        text_field=request.text_field,
    )
    if request.backend != REFERENCE:
        listener.notice(f"backend    {choice.name}: {choice.reason}")
    return choice


def _bad_of(record: PartRecord) -> list[BadDocument]:
    return [document for document in record.bad if document.fault != "empty"]


def _check_bad(bad: list[BadDocument], max_bad: int) -> None:
    if len(bad) > max_bad:
        listed = "".join(f"\n  {document}" for document in bad[:_NAMED_BAD])
        raise DataError(
            f"{len(bad)} bad documents, more than --max-bad {max_bad}; among them:{listed}\n"
            "mend or --exclude these files, check --text-field, or allow more by --max-bad"
        )


def _merge(
    request: BuildRequest,
    plan: BuildPlan,
    staging: Staging,
    path: Path,
    *,
    records: list[PartRecord],
    tokenizer: Tokenizer,
) -> Manifest:
    identity = tokenizer.identity
    if staging.shards.exists():
        shutil.rmtree(staging.shards)
    staging.shards.mkdir()
    inputs, bad = _write_lists(staging.shards, records)
    if sum(record.documents for record in records) == 0:
        staging.discard()
        raise DataError(_no_documents(records, bad))
    dtype = token_dtype(identity.vocab_size).name
    shards = write_shards(staging, records, settings=plan.settings, identity=identity, dtype=dtype)
    counts = {split: sum(s.documents for s in shards if s.split == split) for split in SPLITS}
    if min(counts.values()) == 0:
        staging.discard()
        raise DataError(
            f"the corpus has {sum(counts.values())} documents: {counts['train']} for training and "
            f"{counts['val']} for validation (chosen by content, {request.train_split:g}/"
            f"{request.val_split:g}), expected at least one each; give more documents or another "
            "--train-split"
        )
    write_durably(staging.shards / path.name, path.read_bytes())
    return Manifest(
        tool_version=version("mamba-dist"),
        dtype=dtype,
        tokenizer=replace(identity, file=path.name),
        settings=plan.settings,
        inputs=InputSummary(
            files=len(request.corpus.files),
            bytes=request.corpus.bytes,
            documents=sum(record.documents for record in records),
            bad_documents=len(bad),
            text_bytes=sum(record.text_bytes for record in records),
            sha256=inputs,
        ),
        shards=tuple(shards),
        backend=staging.backend(),
    )


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
