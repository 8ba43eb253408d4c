"""What a checkpoint says of itself: manifest.json, written last.

Version 1, `{"manifest": {…}, "sha256": "…"}`; the hash is that of the manifest's own compact JSON.
`fragments` says for each rank's contiguous range of each parameter where it stands and what its
bytes hash to; `files` gives the size of every file and the hash of what else is in it, so that
nothing damaged is ever loaded.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mamba_dist.checkpoint.faults import is_damage
from mamba_dist.checkpoint.layout import MANIFEST
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import Segment
from mamba_dist.errors import (
    CheckpointError,
    DamagedCheckpointError,
    OtherVersionError,
    UnreadableCheckpointError,
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Progress(_Record):
    """How far a run is: everything the loop needs to go on exactly where it stopped."""

    step: int
    """Optimizer steps taken, skipped ones included."""
    next_sample: int
    """Global position of the first sample that was not yet trained on."""
    trained_tokens: int
    """Labels that contributed to the loss."""
    global_batch_size: int
    """Sequences per optimizer step."""
    data_fingerprint: str
    """Fingerprint of the data set's manifest, or of all those of the mixture."""
    segments: tuple[Segment, ...] = ()
    """The order of samples from the first to the last. None: the checkpoint is older than mixtures,
    and the run has read one data set in one batch size all along."""
    recent_losses: tuple[float, ...] = ()
    """Nats per token of the last applied steps, by which training.spike_sigmas judges the next."""
    recent_grad_norms: tuple[float, ...] = ()
    """Their gradient norms before clipping."""


class TokenizerRecord(_Record):
    """The tokenizer of the data that the model was trained on."""

    sha256: str
    eos_token: str
    """Given again when the tokenizer is loaded, since it may have been chosen by hand."""


class FileRecord(_Record):
    """Size and hash of one file of the checkpoint."""

    name: str
    size_bytes: int
    header_sha256: str | None = None
    """Of what stands before the tensors, which have hashes of their own: so all can be verified
    while it is read for use. None: the checkpoint is older than this field."""
    sha256: str | None = None
    """Of the whole file, in checkpoints without `header_sha256`: each byte is hashed once."""


class FragmentRecord(_Record):
    """Where one contiguous range of a parameter stands; hashes are of its little-endian bytes."""

    name: str
    file: str
    start: int
    numel: int
    master_sha256: str
    exp_avg_sha256: str
    exp_avg_sq_sha256: str


class RankRecord(_Record):
    """What one rank wrote."""

    file: FileRecord
    shapes: dict[str, list[int]]
    fragments: list[FragmentRecord]


class CheckpointManifest(_Record):
    """The whole checkpoint."""

    version: Literal[1] = 1
    progress: Progress
    adam_steps: int
    world_size: int
    engine: str
    versions: dict[str, str]
    saved_at: float | None = None
    """Seconds since 1970 by the clock of rank 0. None: the checkpoint is older than this field."""
    val_loss: float | None = None
    """Validation loss of this very state, in nats per token. None: it was not validated, or the
    loss was not finite, or the checkpoint is older than this field."""
    config: RunConfig
    tokenizer: TokenizerRecord
    shapes: dict[str, list[int]]
    files: list[FileRecord]
    fragments: list[FragmentRecord]


def manifest_text(manifest: CheckpointManifest) -> str:
    """The contents of manifest.json."""
    body = manifest.model_dump(mode="json")
    return _compact({"manifest": body, "sha256": _hash_of_body(body)})


def read_manifest(folder: Path, *, name: str = MANIFEST) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or not readable as one.
        OtherVersionError: it is whole, and of another version.
        UnreadableCheckpointError: the system does not give it now.
    """
    path = folder / name
    try:
        text = path.read_bytes()
        stored = json.loads(text)
        # The text too: 1e-05 and 1E-05, a bit apart, are the same number.
        if not (
            isinstance(stored, dict)
            and stored.get("sha256") == _hash_of_body(stored.get("manifest"))
            and text == _compact(stored).encode()
        ):
            raise DamagedCheckpointError(
                f"{path}: does not hash to what was written: its contents changed"
            )
        return CheckpointManifest.model_validate_json(_compact(stored["manifest"]))
    except OSError as error:
        if not is_damage(error):
            raise UnreadableCheckpointError.of(path, error) from error
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); name a run folder or a step-… folder in it"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OtherVersionError(
            f"{path}: not a checkpoint manifest of version 1 ({where}: {first['msg']}); "
            f"use the version of mamba-dist that wrote it, or move {folder.name} away to use an "
            "older checkpoint"
        ) from error
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{path}: is not JSON ({error}): its contents changed"
        ) from error


def fragments_by_parameter(manifest: CheckpointManifest) -> dict[str, list[FragmentRecord]]:
    """The fragments of each parameter that has a shape or a fragment, by their place in it."""
    found: dict[str, list[FragmentRecord]] = {name: [] for name in manifest.shapes}
    for fragment in sorted(manifest.fragments, key=lambda f: f.start):
        found.setdefault(fragment.name, []).append(fragment)
    return found


def parameter_numel(manifest: CheckpointManifest, name: str) -> int:
    """Elements of a parameter; none if it has no shape."""
    return math.prod(manifest.shapes.get(name, [0]))


def _hash_of_body(body: Any) -> str:
    return hashlib.sha256(_compact(body).encode()).hexdigest()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
