"""From a corpus to a data set: plan, tokenise units in workers, merge the parts, publish."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mamba_dist.data.document_ids import DOCUMENT_IDS_NAME
from mamba_dist.data.durable import exclusive_lock, hash_file, shared_lock, sync_folder, write_once
from mamba_dist.data.manifest import (
    BAD_DOCUMENTS_NAME,
    DEFAULT_MAX_RECORD_BYTES,
    INPUTS_NAME,
    MANIFEST_NAME,
    BuildSettings,
    Manifest,
    read_manifest,
    write_manifest,
)
from mamba_dist.data.preparation.bad_documents import check_bad, counted
from mamba_dist.data.preparation.documents import Reading
from mamba_dist.data.preparation.fast_backends import REFERENCE, use_one_thread
from mamba_dist.data.preparation.merge import merge_parts
from mamba_dist.data.preparation.parity import BackendChoice, choose_backend
from mamba_dist.data.preparation.part_making import make_parts
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.parts import PartSettings
from mamba_dist.data.preparation.sampling import sample_texts
from mamba_dist.data.preparation.share import Share, check_all_made
from mamba_dist.data.preparation.source_ids import check_has_ids
from mamba_dist.data.preparation.sources import Corpus, Unit, cut_units
from mamba_dist.data.preparation.staging import (
    BuildPlan,
    Staging,
    check_same_build,
    clear_remains,
    open_staging,
    publish,
)
from mamba_dist.data.preparation.standard_input import discard_standard_input
from mamba_dist.data.shard import token_dtype
from mamba_dist.data.tokenization import (
    Tokenizer,
    dataset_file_name,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from mamba_dist.errors import ChangedPartError, DataError

DEFAULT_MAX_BAD = 100


@dataclass(frozen=True)
class BuildRequest:
    """What a user asks for.

    Exactly one of `tokenizer` (a file) and `train_vocab_size` (train on the corpus, reading about
    `sample_bytes` of it) is given. More than `max_bad` bad documents stop the build; empty ones are
    only counted, since source trees are full of empty files. A JSON line or a table's cell longer
    than `max_record_bytes` is a bad document. `id_field` holds a document's id in its source, which
    is kept beside the shards. `backend` is as in `choose_backend`.
    With `merge_only`, parts that are not made yet are an error. With `deduplicate` only the first
    document of each text is taken.
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
    merge_only: bool = False
    deduplicate: bool = False
    sample_bytes: int = 200 << 20
    unit_bytes: int = 2 << 20
    shard_bytes: int = 512 << 20
    batch_tokens: int = 8 << 20
    backend: str = REFERENCE
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    id_field: str | None = None


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


@dataclass(frozen=True)
class ShareResult:
    """A share whose `units` are all made. `was_complete`: the whole data set was there already."""

    units: int
    was_complete: bool


def build_dataset(request: BuildRequest, listener: BuildListener) -> BuildResult:
    """The data set at `request.output`: made, continued, or found complete.

    Raises:
        DataError: see the messages; until the last moment the folder holds no manifest, or the
        older one.
    """
    with _explained(request):
        return _build(request, listener)


def build_share(request: BuildRequest, share: Share, listener: BuildListener) -> ShareResult:
    """Makes the units of a share, while other processes may make those of other shares.

    A `build_dataset` of the same request then finds them done.

    Raises:
        DataError: see the messages.
    """
    with _explained(request):
        return _build_share(request, share, listener)


@contextlib.contextmanager
def _explained(request: BuildRequest) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or request.output}: {error.strerror or error}; mend that and run the "
            "same command again to continue"
        ) from error


def _build(request: BuildRequest, listener: BuildListener) -> BuildResult:
    # Loading it first: a wrong file is reported before anything is written.
    given = _load(request, request.tokenizer) if request.tokenizer is not None else None
    plan = _plan(request)
    _make_folder(request.output)
    with exclusive_lock(request.output):
        try:
            return _build_locked(request, plan, given=given, listener=listener)
        finally:
            # Under the lock, or it might be another build's.
            discard_standard_input(request.output)


def _build_locked(
    request: BuildRequest, plan: BuildPlan, *, given: Tokenizer | None, listener: BuildListener
) -> BuildResult:
    if (manifest := _complete(request, plan)) is not None:
        clear_remains(request.output, plan)
        return BuildResult(manifest, was_complete=True)
    _check_ids(request)
    # A merge is of parts that tasks have made.
    keep_own = request.merge_only or not request.overwrite
    staging = open_staging(request.output, plan, overwrite=request.overwrite, keep_own=keep_own)
    staging.clear_leftovers()
    if request.merge_only:
        _check_all_made(request, staging)
    path = _stage_tokenizer(request, staging, listener)
    tokenizer = given or _load(request, path)
    manifest = _make_all(request, plan, staging, path=path, tokenizer=tokenizer, listener=listener)
    names = [shard.file for shard in manifest.shards]
    names += [INPUTS_NAME, BAD_DOCUMENTS_NAME, path.name]
    names += [DOCUMENT_IDS_NAME] if request.id_field is not None else []
    publish(request.output, staging, names=names)
    sync_folder(request.output)
    write_manifest(request.output, manifest)
    staging.discard()
    return BuildResult(manifest, was_complete=False)


def _make_all(
    request: BuildRequest,
    plan: BuildPlan,
    staging: Staging,
    *,
    path: Path,
    tokenizer: Tokenizer,
    listener: BuildListener,
) -> Manifest:
    """Makes what is missing and merges all; a damaged part is made again, once."""
    again: set[int] = set()
    while True:
        records = _make_parts(request, staging, path, tokenizer=tokenizer, listener=listener)
        try:
            return merge_parts(plan, staging, path, records=records, identity=tokenizer.identity)
        except ChangedPartError as error:
            staging.forget(error.unit)
            if request.merge_only:
                raise DataError(
                    f"{error}; it was dropped: run the tasks again, or this without --merge"
                ) from error
            if error.unit in again:
                raise
            again.add(error.unit)
            listener.notice(f"{error}; it is made again")


def _build_share(request: BuildRequest, share: Share, listener: BuildListener) -> ShareResult:
    if request.tokenizer is None:
        raise DataError(
            "several tasks cannot train one tokenizer; train it first by `python "
            "tools/train_tokenizer.py CORPUS --vocab-size N --output tokenizer.json`, and give it "
            "to all by --tokenizer"
        )
    tokenizer = _load(request, request.tokenizer)
    plan = _plan(request)
    _make_folder(request.output)
    with shared_lock(request.output):
        if _complete(request, plan) is not None:
            return ShareResult(0, was_complete=True)
        _check_ids(request)
        staging = open_staging(request.output, plan, overwrite=False, share=share)
        name = f".task-{share.index}-of-{share.count}.lock"
        busy = f"another process is doing task {share}; wait for it to end"
        with exclusive_lock(staging.folder, name=name, busy=busy):
            staging.clear_leftovers()
            path = _stage_tokenizer(request, staging, listener)
            records = _make_parts(
                request, staging, path, tokenizer=tokenizer, listener=listener, share=share
            )
            return ShareResult(len(records), was_complete=False)


def _make_folder(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    sync_folder(output.parent)


def _complete(request: BuildRequest, plan: BuildPlan) -> Manifest | None:
    """The manifest of a finished data set, if there is one to be kept."""
    if request.overwrite or not (request.output / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(request.output)
    check_same_build(request.output, manifest, plan=plan)
    return manifest


def _reading(request: BuildRequest) -> Reading:
    return Reading(request.text_field, request.id_field, request.max_record_bytes)


def _check_ids(request: BuildRequest) -> None:
    if request.id_field is not None:
        check_has_ids(request.corpus.files, _reading(request))


def _check_all_made(request: BuildRequest, staging: Staging) -> None:
    units = cut_units(request.corpus.files, unit_bytes=request.unit_bytes)
    finished = staging.finished({unit.index: unit for unit in units})
    missing = [unit.index for unit in units if unit.index not in finished]
    counts = staging.task_counts()
    if not finished:
        staging.discard()
    check_all_made(missing, units=len(units), counts=counts)


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
        deduplicate=request.deduplicate,
        max_record_bytes=request.max_record_bytes,
        id_field=request.id_field,
    )
    return BuildPlan(settings, request.unit_bytes, request.corpus.files)


def _stage_tokenizer(request: BuildRequest, staging: Staging, listener: BuildListener) -> Path:
    if request.tokenizer is not None:
        path = staging.folder / dataset_file_name(request.tokenizer)
        write_once(path, request.tokenizer.read_bytes())
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
    share: Share | None = None,
) -> list[PartRecord]:
    every = cut_units(request.corpus.files, unit_bytes=request.unit_bytes)
    units = {unit.index: unit for unit in every if share is None or share.has(unit.index)}
    finished = staging.finished(units)
    todo = [unit for unit in units.values() if unit.index not in finished]
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
        reading=_reading(request),
        train_split=request.train_split,
        batch_documents=request.batch_documents,
        backend=choice.name,
        max_bad=request.max_bad,
        deduplicate=request.deduplicate,
    )
    listener.started(
        total_bytes=sum(unit.bytes for unit in units.values()),
        done_bytes=sum(units[index].bytes for index in finished),
    )
    bad = check_bad(staging.parts, units, finished.values(), max_bad=request.max_bad)
    records = make_parts(
        request.workers,
        todo,
        settings,
        encoder=choice.encoder,
        staging=staging,
        notice=listener.notice,
    )
    with contextlib.closing(records):
        for together in records:
            staging.commit(together)
            for record in together:
                finished[record.unit] = record
                listener.advanced(units[record.unit], record)
                bad += counted(record.faults)
            if bad > request.max_bad:
                check_bad(staging.parts, units, finished.values(), max_bad=request.max_bad)
    return [finished[index] for index in units]


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
