"""A flipped byte anywhere is found before training goes on, and no byte is read twice for that."""

import hashlib
from pathlib import Path

import pytest
import torch
from written_checkpoint import OneRank, fragments_of, snapshot, write_as_ranks

from mamba_dist.checkpoint.layout import MANIFEST, checkpoint_folder
from mamba_dist.checkpoint.manifest import FileRecord, manifest_text, read_manifest
from mamba_dist.checkpoint.reader import CheckpointReader, DamageNote, find_checkpoint
from mamba_dist.checkpoint.store import save_checkpoint
from mamba_dist.engine.base import STATE_KINDS, Fragment
from mamba_dist.errors import DamagedCheckpointError


def damage_met(folder: Path) -> str | None:
    """What a resume from this checkpoint finds damaged."""
    try:
        reader = CheckpointReader(folder)
    except DamagedCheckpointError as error:
        return str(error)
    if damage := reader.damaged_file(contents=False):
        return damage
    noted = DamageNote(reader)
    for fragment in fragments_of(reader.step):
        for kind in STATE_KINDS:
            numel = fragment.master.numel()
            read = noted.read(fragment.name, kind, start=fragment.start, numel=numel)
            assert read.shape == (numel,)
            assert noted.damage or torch.equal(read, fragment.tensor(kind))
    return None if noted.damage is None else str(noted.damage)


def test_a_flip_of_every_single_byte_is_found_and_named(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 2, 2)
    assert damage_met(folder) is None
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        MANIFEST,
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    for path in files:
        original = path.read_bytes()
        for place in range(len(original)):
            damaged = bytearray(original)
            # The bit that tells e from E, which JSON does not, and another.
            damaged[place] ^= 0x20 if place % 2 or path.name == MANIFEST else 0x01
            path.write_bytes(damaged)
            damage = damage_met(folder)
            assert damage is not None, (path.name, place)
            assert str(path) in damage
        path.write_bytes(original)


def bytes_read() -> int:
    fields = dict(
        line.split(": ") for line in Path("/proc/self/io").read_text().splitlines() if line
    )
    return int(fields["rchar"])


def test_loading_reads_each_byte_once(tmp_path: Path) -> None:
    state = torch.arange(3 << 18, dtype=torch.float32)
    fragments = [Fragment("a", (3 << 18,), 0, state, state + 1, state + 2)]
    save_checkpoint(tmp_path, snapshot(1, fragments=fragments), ranks=OneRank())
    size = sum(f.stat().st_size for f in checkpoint_folder(tmp_path, 1).iterdir())
    before = bytes_read()
    reader = find_checkpoint(tmp_path, ranks=OneRank(), notice=pytest.fail, contents=False)
    assert reader is not None
    for kind in STATE_KINDS:
        reader.read("a", kind, start=0, numel=3 << 18)
    assert size <= bytes_read() - before < 1.01 * size


def without_header_hashes(folder: Path) -> None:
    """Makes it a checkpoint of a version that had none."""
    manifest = read_manifest(folder)
    files = [
        FileRecord(
            name=record.name,
            size_bytes=record.size_bytes,
            sha256=hashlib.sha256((folder / record.name).read_bytes()).hexdigest(),
        )
        for record in manifest.files
    ]
    text = manifest_text(manifest.model_copy(update={"files": files}))
    (folder / MANIFEST).write_text(text)


def test_an_older_checkpoint_without_hashes_of_headers_is_verified_as_well(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 2, 1)
    without_header_hashes(folder)
    assert damage_met(folder) is None
    path = folder / "rank-00000.safetensors"
    original = path.read_bytes()
    for place in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[place] ^= 0x01
        path.write_bytes(damaged)
        assert damage_met(folder) is not None, place


def test_a_file_that_is_cut_after_it_was_looked_over_is_damage_and_no_crash(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 1, 1)
    reader = CheckpointReader(folder)
    assert reader.damaged_file(contents=False) is None
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    noted = DamageNote(reader)
    for fragment in fragments_of(1):
        for kind in STATE_KINDS:
            noted.read(fragment.name, kind, start=0, numel=fragment.master.numel())
    assert "rank-00000.safetensors cannot be read (it ends too early)" in str(noted.damage)
