"""Every fault of a checkpoint is named with its file, those of the manifest's own claims too."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from written_checkpoint import write_as_ranks

from mamba_dist.checkpoint.layout import MANIFEST
from mamba_dist.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    manifest_text,
    read_manifest,
)
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.data.durable import hash_file
from mamba_dist.errors import CheckpointError


def damage_of(folder: Path, manifest: CheckpointManifest | None = None) -> list[tuple[str, str]]:
    manifest = read_manifest(folder) if manifest is None else manifest
    return [(d.path.name, d.fault) for d in checkpoint_damage(folder, manifest)]


def test_every_damaged_file_is_named_and_the_progress_is_whole(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 5, 4)
    assert damage_of(folder) == []
    manifest = read_manifest(folder)
    victims = [folder / record.name for record in manifest.files]
    flipped = bytearray(victims[0].read_bytes())
    flipped[-1] ^= 1
    victims[0].write_bytes(flipped)
    os.truncate(victims[1], 20)
    victims[3].unlink()
    advanced: list[int] = []
    found = [
        (d.path, d.fault) for d in checkpoint_damage(folder, manifest, advance=advanced.append)
    ]
    assert [path for path, _ in found] == [victims[0], victims[1], victims[3]]
    for (_, fault), words in zip(found, ("not hash", "20 bytes", "cannot be read"), strict=True):
        assert words in fault
    assert sum(advanced) == sum(record.size_bytes for record in manifest.files)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda fragments: fragments[1:], "missing"),
        (lambda fragments: [*fragments, fragments[0]], "stored twice"),
    ],
)
def test_a_manifest_that_misses_or_repeats_elements_is_named(
    tmp_path: Path, change, fault: str
) -> None:
    folder = write_as_ranks(tmp_path, 5, 2)
    manifest = read_manifest(folder)
    changed = manifest.model_copy(update={"fragments": change(manifest.fragments)})
    (folder / MANIFEST).write_text(manifest_text(changed))
    found = damage_of(folder)
    assert any(name == MANIFEST and fault in text and "parameter a" in text for name, text in found)


def rewritten(folder: Path, change) -> CheckpointManifest:
    """The manifest of a checkpoint whose only file holds other tensors and hashes to them."""
    path = folder / "rank-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    hashes = hash_file(path)
    record = FileRecord(name=path.name, size_bytes=hashes.bytes, sha256=hashes.sha256)
    return read_manifest(folder).model_copy(update={"files": [record]})


def test_a_file_that_hashes_but_holds_other_tensors_is_named(tmp_path: Path) -> None:
    def change(tensors) -> None:
        del tensors["a|master"]
        tensors["b|exp_avg"] = tensors["b|exp_avg"][1:].clone()
        tensors["c|master"] = tensors["c|master"].half()
        tensors["d|master"] = tensors["b|master"].clone()

    folder = write_as_ranks(tmp_path, 5, 1)
    found = damage_of(folder, rewritten(folder, change))
    assert {name for name, _ in found} == {"rank-00000.safetensors"}
    assert sorted(text.partition(",")[0] for _, text in found) == [
        "holds b|exp_avg as F32 [6]",
        "holds c|master as F16 [1]",
        "holds d|master",
        "lacks a|master",
    ]


def test_a_tensor_shorter_than_recorded_is_refused_when_read_in_blocks(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 5, 1)
    changed = rewritten(folder, lambda tensors: tensors.update({"b|master": torch.zeros(3)}))
    (folder / MANIFEST).write_text(manifest_text(changed))
    with pytest.raises(CheckpointError, match=r"b \(master\) does not hash"):
        list(CheckpointReader(folder).blocks("b", "master", numel=2))


def test_fragments_of_an_unknown_file_or_parameter_are_named(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 5, 2)
    manifest = read_manifest(folder)
    shapes = {name: shape for name, shape in manifest.shapes.items() if name != "b"}
    changed = manifest.model_copy(update={"shapes": shapes, "files": manifest.files[:1]})
    assert damage_of(folder, changed) == [
        (
            MANIFEST,
            "is incomplete: parameter b: 7 elements stored, 0 expected; use another checkpoint",
        ),
        (MANIFEST, "places fragments in rank-00001.safetensors, which has no hash"),
    ]
    (folder / MANIFEST).write_text(manifest_text(changed))
    with pytest.raises(CheckpointError, match="parameter b: 7 elements stored, 0 expected"):
        CheckpointReader(folder)
