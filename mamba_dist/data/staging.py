"""The unfinished data set: a folder `.partial-<plan>` in the output folder, where a re-run goes on.

    .partial-3f2a…/
        plan.json        settings and inputs; its hash is the folder's name
        tokenizer.json   the tokenizer in use, copied or trained
        parts/           one file a finished unit
        journal.jsonl    one line a finished unit, forced to disk after its part
        backend.json     the proof of the fast backend that made parts, if one did
        shards/          the merge, renamed into the output folder at the end

Parts of another plan cannot mix in, since another plan has another folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mamba_dist.data.durable import quick_hash, write_durably
from mamba_dist.data.manifest import MANIFEST_NAME, BackendProof, BuildSettings, Manifest
from mamba_dist.data.parts import PartRecord, part_path
from mamba_dist.data.shard import check_size
from mamba_dist.data.shard_index import INDEX_NAME
from mamba_dist.data.sources import InputFile
from mamba_dist.errors import DataError

INPUTS_NAME = "inputs.jsonl"
BAD_DOCUMENTS_NAME = "bad_documents.jsonl"
_PREFIX = ".partial-"
_OURS = (
    "train-*.arrow",
    "val-*.arrow",
    INDEX_NAME,
    INPUTS_NAME,
    BAD_DOCUMENTS_NAME,
    "tokenizer.*",
)
_NAMED_DIFFERENCES = 3


@dataclass(frozen=True)
class BuildPlan:
    """What is to be made of what. Two builds with equal plans write equal bytes."""

    settings: BuildSettings
    unit_bytes: int
    files: tuple[InputFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json; a file is known by name, size and time of change."""
        inputs = [[file.name, file.bytes, file.changed_at_ns] for file in self.files]
        return {
            "settings": asdict(self.settings),
            "unit_bytes": self.unit_bytes,
            "inputs": inputs,
        }


class Staging:
    """The folder of one unfinished build, and its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = folder / "parts"
        self.shards = folder / "shards"
        self._journal = folder / "journal.jsonl"
        self._backend = folder / "backend.json"

    def finished(self) -> dict[int, PartRecord]:
        """The committed parts by unit; a line that a crash cut short is dropped."""
        if not self._journal.exists():
            return {}
        content = self._journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            write_durably(self._journal, whole)
        records = [PartRecord.from_json(json.loads(line)) for line in whole.splitlines()]
        return {record.unit: record for record in records if self._has_part(record)}

    def commit(self, record: PartRecord) -> None:
        """Notes a finished part; after this it is never made again."""
        with self._journal.open("ab") as stream:
            stream.write(json.dumps(record.to_json()).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def note_backend(self, proof: BackendProof) -> None:
        """Remembers that a fast backend makes parts from now on."""
        write_durably(self._backend, json.dumps(asdict(proof)).encode())

    def backend(self) -> BackendProof | None:
        """The last fast backend that made parts, in this run or an earlier one."""
        if not self._backend.exists():
            return None
        return BackendProof(**json.loads(self._backend.read_bytes()))

    def discard(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _has_part(self, record: PartRecord) -> bool:
        path = part_path(self.parts, record.unit)
        return path.is_file() and path.stat().st_size == record.bytes


def open_staging(output: Path, plan: BuildPlan, *, overwrite: bool) -> Staging:
    """The staging folder of a plan, new or as an interrupted run left it.

    Raises:
        DataError: the output folder holds an unfinished build of another plan (and not
        `overwrite`), or
            files that are not ours.
    """
    content = plan.to_json()
    encoded = json.dumps(content, indent=1).encode()
    folder = output / (_PREFIX + hashlib.sha256(encoded).hexdigest()[:16])
    _refuse_foreign_files(output)
    for other in sorted(output.glob(_PREFIX + "*")):
        if other == folder:
            continue
        if not overwrite:
            raise DataError(
                f"{output} holds an unfinished data set made with other settings or inputs "
                f"({_differences_from(other, content)}); run the earlier command again to finish "
                f"it, or "
                "add --overwrite to start over"
            )
        shutil.rmtree(other)
    staging = Staging(folder)
    staging.parts.mkdir(parents=True, exist_ok=True)
    write_durably(folder / "plan.json", encoded)
    return staging


def check_same_build(output: Path, manifest: Manifest, *, plan: BuildPlan) -> None:
    """Nothing, if a finished data set is whole and is what the plan would make.

    Raises:
        DataError: a file is missing or changed, or the settings or inputs differ; the message says
        how.
    """
    for shard in manifest.shards:
        check_size(output / shard.file, shard)
    made = [[line["name"], line["bytes"], line["xxh3"]] for line in _read_inputs(output, manifest)]
    found = [[file.name, file.bytes] for file in plan.files]
    differences = _setting_differences(asdict(manifest.settings), asdict(plan.settings))
    if not differences and found == [entry[:2] for entry in made]:
        found = [[file.name, file.bytes, quick_hash(Path(file.path))] for file in plan.files]
        differences = _input_differences(made, found)
    elif found != [entry[:2] for entry in made]:
        differences += _input_differences([entry[:2] for entry in made], found)
    if differences:
        raise DataError(
            f"{output} holds a finished data set made otherwise ({'; '.join(differences)}); give "
            "another --output, or --overwrite to replace it"
        )


def publish(output: Path, staging: Staging, *, names: Iterable[str]) -> None:
    """Moves the finished files from `staging.shards` into the output folder, all but the manifest.

    What lay there of an older data set goes away, its manifest first: between the two there is no
    data set.
    """
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in _OURS:
        for old in output.glob(pattern):
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


def _refuse_foreign_files(output: Path) -> None:
    foreign = [
        path.name
        for path in sorted(output.iterdir())
        if not path.name.startswith(".")
        and path.name != MANIFEST_NAME
        and not any(path.match(pattern) for pattern in _OURS)
    ]
    if foreign:
        raise DataError(
            f"{output} is not empty and not a data set (it holds {', '.join(foreign[:3])}); give a "
            "new folder by --output"
        )


def _differences_from(folder: Path, content: dict[str, Any]) -> str:
    try:
        other = json.loads((folder / "plan.json").read_bytes())
    except (OSError, ValueError):
        return f"{folder.name} has no readable plan"
    differences = _setting_differences(other["settings"], content["settings"])
    differences += _input_differences(other["inputs"], content["inputs"])
    if other["unit_bytes"] != content["unit_bytes"]:
        differences.append(f"unit_bytes was {other['unit_bytes']}, is {content['unit_bytes']}")
    return "; ".join(differences)


def _setting_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if before.get(key) != now[key]
    ]


def _input_differences(before: Sequence[list[Any]], now: Sequence[list[Any]]) -> list[str]:
    old = {entry[0]: entry[1:] for entry in before}
    new = {entry[0]: entry[1:] for entry in now}
    changes = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    found = [
        f"{len(names)} input files {what}: {', '.join(names[:_NAMED_DIFFERENCES])}"
        + " …" * (len(names) > _NAMED_DIFFERENCES)
        for what, names in changes.items()
        if names
    ]
    if not found and list(before) != list(now):
        found = ["the input files come in another order"]
    return found
