"""The unfinished data set: a folder `.partial-<plan>` in the output folder, where a re-run goes on.

    .partial-3f2a…/
        plan.json        settings and inputs; its hash is the folder's name
        tokenizer.json   the tokenizer in use, copied or trained
        parts/           one file a finished unit
        journal.jsonl    one line a finished unit, forced to disk after its part
        journal-I-of-N.jsonl    the same of task I of N
        backend-….json   the proof of a fast backend that made parts
        at_work          a process is making parts itself, or died of it
        shards/          the merge, renamed into the output folder at the end

Parts of another plan cannot mix in, since another plan has another folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from mamba_dist.data.durable import exclusive_lock, quick_hash, sync_folder, write_once
from mamba_dist.data.manifest import (
    INPUTS_NAME,
    MANIFEST_NAME,
    BackendProof,
    BuildSettings,
    Manifest,
)
from mamba_dist.data.preparation.output_folder import (
    is_ours,
    refuse_another_tokenizer,
    refuse_foreign_files,
    refuse_inputs,
)
from mamba_dist.data.preparation.part_records import PartRecord, part_path
from mamba_dist.data.preparation.plan_differences import (
    input_differences,
    setting_differences,
)
from mamba_dist.data.preparation.share import Share
from mamba_dist.data.preparation.sources import InputFile, Unit
from mamba_dist.data.shard import check_size
from mamba_dist.data.shard_index import INDEX_NAME
from mamba_dist.errors import DataError

_PREFIX = ".partial-"


@dataclass(frozen=True)
class BuildPlan:
    """What is to be made of what. Two builds with equal plans write equal bytes."""

    settings: BuildSettings
    unit_bytes: int
    files: tuple[InputFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json; a file is known by name, size, time of change and how it is
        read.
        """
        inputs = [
            [file.name, file.bytes, file.changed_at_ns, file.format, file.compression]
            for file in self.files
        ]
        return {
            "settings": self.settings.to_json(),
            "unit_bytes": self.unit_bytes,
            "inputs": inputs,
        }


class Staging:
    """The folder of one unfinished build, and its journal."""

    def __init__(self, folder: Path, share: Share | None = None) -> None:
        self.folder = folder
        self.parts = folder / "parts"
        self.shards = folder / "shards"
        whose = "" if share is None else f"-{share.index}-of-{share.count}"
        self._journal = folder / f"journal{whose}.jsonl"
        self._at_work = folder / f"at_work{whose}"
        self._share = share

    def finished(self, units: Mapping[int, Unit]) -> dict[int, PartRecord]:
        """The committed parts of `units`, whoever made them. What cannot be read was cut short by a
        crash, or is being written, and counts as not made, as does what is of other slices.
        """
        journals = sorted(self.folder.glob("journal*.jsonl"))
        lines = [line for journal in journals for line in journal.read_bytes().split(b"\n")]
        records = [record for line in lines if (record := _read_line(line)) is not None]
        return {
            record.unit: record
            for record in records
            if record.unit in units and record.is_of(units[record.unit]) and self._has_part(record)
        }

    def forget(self, unit: int) -> None:
        """Has a unit made again, since its part is damaged."""
        part_path(self.parts, unit).unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Removes what killed processes left half-written; of a task, in its own share.

        To be called under the lock that keeps others off these units.
        """
        leftovers = [
            path
            for path in self.parts.glob(".unit-*.partial")
            if self._share is None or self._share.has(int(path.name[6:14]))
        ]
        # Looked for after the files: a task of units shared out otherwise may be at one of these.
        if self._share is not None and any(
            not path.name.endswith(f"-of-{self._share.count}.lock")
            for path in self.folder.glob(".task-*.lock")
        ):
            return
        for path in leftovers:
            path.unlink(missing_ok=True)

    def commit(self, records: Sequence[PartRecord]) -> None:
        """Notes finished parts; after this they are never made again."""
        is_new = not self._journal.exists()
        with self._journal.open("ab+") as stream:
            lines = [json.dumps(record.to_json()).encode() + b"\n" for record in records]
            stream.write(_line_break_before(stream) + b"".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(self.folder)

    def task_counts(self) -> set[int]:
        """The numbers of tasks that builds of this folder were shared among."""
        names = [path.stem for path in self.folder.glob("journal-*-of-*.jsonl")]
        return {int(name.rpartition("-")[2]) for name in names}

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Leaves a mark while parts are made in this very process, which a sudden death leaves.

        SIGTERM is none: a cluster sends it to whom it wants to end.
        """
        self._at_work.touch()
        try:
            with self._unmarked_by_sigterm():
                yield
        finally:
            self.unmark()

    def unmark(self) -> None:
        """Forgets that a process died at its work."""
        self._at_work.unlink(missing_ok=True)

    def died_at_work(self) -> bool:
        """Whether an earlier process died while it made parts itself."""
        return self._at_work.exists()

    def note_backend(self, proof: BackendProof) -> None:
        """Remembers that a fast backend makes parts from now on."""
        content = json.dumps(asdict(proof)).encode()
        # A name for each proof, since tasks on other machines may have other versions.
        path = self.folder / f"backend-{hashlib.sha256(content).hexdigest()[:16]}.json"
        write_once(path, content)

    def backends(self) -> tuple[BackendProof, ...]:
        """The fast backends that made parts, in this run, earlier ones or other tasks."""
        paths = self.folder.glob("backend*.json")
        proofs = [BackendProof(**json.loads(path.read_bytes())) for path in paths]
        return tuple(sorted(proofs, key=astuple))

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def _unmarked_by_sigterm(self) -> Iterator[None]:
        is_ours = threading.current_thread() is threading.main_thread()
        if not is_ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            yield
            return

        def end(number: int, _: FrameType | None) -> None:
            self.unmark()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _has_part(self, record: PartRecord) -> bool:
        path = part_path(self.parts, record.unit)
        return path.is_file() and path.stat().st_size == record.bytes


def _read_line(line: bytes) -> PartRecord | None:
    try:
        return PartRecord.from_json(json.loads(line))
    except (ValueError, TypeError, KeyError):
        return None


def _line_break_before(stream: BinaryIO) -> bytes:
    """Ends the line that a crash cut short, if the journal ends in one."""
    if not stream.tell():
        return b""
    stream.seek(-1, os.SEEK_END)
    return b"" if stream.read() == b"\n" else b"\n"


def open_staging(
    output: Path,
    plan: BuildPlan,
    *,
    overwrite: bool,
    keep_own: bool = True,
    share: Share | None = None,
) -> Staging:
    """The staging folder of a plan, new or as others left it (if `keep_own`).

    Raises:
        DataError: the output folder holds an unfinished build of another plan, or but another
        tokenizer (and not `overwrite`), or an input, or files that are not ours.
    """
    folder = _folder_of(output, plan)
    # One after the other, or two tasks with different plans would not see each other.
    with exclusive_lock(output, name=".opening.lock", wait=True):
        refuse_foreign_files(output)
        refuse_inputs(output, plan.files)
        if not overwrite and not any(output.glob(_PREFIX + "*")):
            refuse_another_tokenizer(output, plan.settings.tokenizer)
        for other in sorted(output.glob(_PREFIX + "*")):
            if other == folder and keep_own:
                continue
            if other != folder and not overwrite:
                raise DataError(
                    f"{output} holds an unfinished data set made with other settings or inputs "
                    f"({_differences_from(other, plan)}); run the earlier command again to finish "
                    "it, or start over with --overwrite and without --task"
                )
            shutil.rmtree(other)
        staging = Staging(folder, share)
        staging.parts.mkdir(parents=True, exist_ok=True)
        write_once(folder / "plan.json", _encoded(plan))
        sync_folder(output)
    return staging


def clear_remains(output: Path, plan: BuildPlan) -> None:
    """Removes what a run left that was killed after it had finished the data set of `plan`."""
    with contextlib.suppress(FileNotFoundError):
        Staging(_folder_of(output, plan)).discard()


def _folder_of(output: Path, plan: BuildPlan) -> Path:
    return output / (_PREFIX + hashlib.sha256(_encoded(plan)).hexdigest()[:16])


def _encoded(plan: BuildPlan) -> bytes:
    return json.dumps(plan.to_json(), indent=1).encode()


def check_same_build(output: Path, manifest: Manifest, *, plan: BuildPlan) -> None:
    """Nothing, if a finished data set is whole and is what the plan would make.

    Raises:
        DataError: a file is missing or changed, or the settings or inputs differ; the message says
        how.
    """
    for shard in manifest.shards:
        check_size(output / shard.file, shard)
    made = [
        [line.get(key) for key in ("name", "bytes", "xxh3", "format", "compression")]
        for line in _read_inputs(output, manifest)
    ]
    found = [[file.name, file.bytes, None, file.format, file.compression] for file in plan.files]
    differences = setting_differences(asdict(manifest.settings), asdict(plan.settings))
    differences += input_differences(made, found)
    if not differences:
        for entry, file in zip(found, plan.files, strict=True):
            entry[2] = quick_hash(Path(file.path))
        differences = input_differences(made, found)
    if differences:
        raise DataError(
            f"{output} holds a finished data set made otherwise ({'; '.join(differences)}); give "
            "another --output, or --overwrite to replace it"
        )


def publish(output: Path, staging: Staging, *, names: Collection[str]) -> None:
    """Moves the finished files from `staging.shards` into the output folder, all but the manifest.

    What lay there of an older data set goes away, its manifest first: between the two there is no
    data set.
    """
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    # Or a power cut might keep the manifest and lose its shards.
    sync_folder(output)
    leftovers = (f".{MANIFEST_NAME}.*.partial", f".{INDEX_NAME}.*.partial")
    for old in list(output.iterdir()):
        # What is renamed over is there at any moment: the tokenizer that was given may be this one.
        is_old = is_ours(old.name) and old.name not in names
        if is_old or any(map(old.match, leftovers)):
            old.unlink()
    for name in names:
        (staging.shards / name).rename(output / name)


def _read_inputs(output: Path, manifest: Manifest) -> list[dict[str, Any]]:
    path = output / INPUTS_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} is missing ({error.strerror}); tokenize again with --overwrite"
        ) from error
    if hashlib.sha256(content).hexdigest() != manifest.inputs.sha256:
        raise DataError(f"{path} was changed; tokenize again with --overwrite")
    return [json.loads(line) for line in content.splitlines()]


def _differences_from(folder: Path, plan: BuildPlan) -> str:
    content = plan.to_json()
    try:
        other = json.loads((folder / "plan.json").read_bytes())
        settings = BuildSettings(**other["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{folder.name} has no readable plan"
    differences = setting_differences(asdict(settings), asdict(plan.settings))
    differences += input_differences(other["inputs"], content["inputs"])
    if other["unit_bytes"] != content["unit_bytes"]:
        differences.append(f"unit_bytes was {other['unit_bytes']}, is {content['unit_bytes']}")
    return "; ".join(differences) or "by another version of this program"


def unfinished_inputs(output: Path) -> set[str]:
    """The names of the inputs of the unfinished data sets in a folder."""
    names: set[str] = set()
    for path in output.glob(f"{_PREFIX}*/plan.json"):
        with contextlib.suppress(ValueError, KeyError):
            names.update(entry[0] for entry in json.loads(path.read_bytes())["inputs"])
    return names
