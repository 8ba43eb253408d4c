"""kill -9, a full disk and a vanished folder at every change of the disk that a save makes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import RANKS, Fault, FaultyDisk, save
from written_checkpoint import OneRank, snapshot, state_of

from mamba_dist.checkpoint.layout import (
    checkpoint_folder,
    checkpoints_folder,
    committed_steps,
    remove_left_behind,
    staging_folder,
)
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.reader import find_checkpoint
from mamba_dist.checkpoint.retention import Retention
from mamba_dist.checkpoint.store import finish_saves, save_checkpoint
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.errors import CheckpointError

# Of rank 0: the staging folder, what it begins with, each of its two files and the manifest in two
# changes and an fsync, three files removed, the rename and two more fsyncs; then what retention
# does.
AT_LEAST_CHANGES = {0: 19, 1: 6}


def committed_are_whole(run_dir: Path) -> list[int]:
    """The committed steps, nothing of which may be missing."""
    steps = committed_steps(run_dir)
    for step in steps:
        folder = checkpoint_folder(run_dir, step)
        assert list(checkpoint_damage(folder, read_manifest(folder))) == []
    return steps


def resumed_step(run_dir: Path) -> int | None:
    """Where the next start goes on, its state being that of the step bit for bit."""
    reader = find_checkpoint(run_dir, ranks=OneRank(), notice=pytest.fail)
    if reader is None:
        return None
    for name, kinds in state_of(reader.step).items():
        for kind, tensor in kinds.items():
            read = reader.read(name, kind, start=0, numel=tensor.numel())
            assert torch.equal(read, tensor.flatten())
    return reader.step


def nothing_is_missing(run_dir: Path, step: int) -> bool:
    """Whether all ranks have left a whole record of their part, or more was done since."""
    for rank in range(RANKS):
        record = staging_folder(run_dir, step) / f"rank-{rank:05d}.safetensors.json"
        try:
            json.loads(record.read_text())
        except (OSError, ValueError):
            # The ranks' records go once the manifest holds what is in them.
            return (record.parent / "manifest.json").exists() and not record.exists()
    return True


def prepared(run_dir: Path, *, saved: bool) -> None:
    run_dir.mkdir()
    if saved:
        assert set(save(FaultyDisk(run_dir), 1).endings.values()) == {None}


def places(tmp_path: Path, *, saved: bool) -> list[tuple[int, int]]:
    """Every change that a save makes, by the rank that makes it."""
    prepared(tmp_path / "counted", saved=saved)
    disk = FaultyDisk(tmp_path / "counted")
    assert set(save(disk, 2).endings.values()) == {None}
    for rank, least in AT_LEAST_CHANGES.items():
        assert disk.changes[rank] >= least
    return [(rank, at) for rank in range(RANKS) for at in range(1, disk.changes[rank] + 1)]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("fault", ["kill one", "kill all"])
def test_after_a_kill_at_any_change_the_next_start_goes_on_from_a_whole_checkpoint(
    tmp_path: Path, fault: Fault, saved: bool
) -> None:
    before, reached, finished = (1 if saved else None), set(), 0
    for victim, at in places(tmp_path, saved=saved):
        run_dir = tmp_path / f"{victim}-{at}"
        prepared(run_dir, saved=saved)
        outcome = save(FaultyDisk(run_dir, fault, victim, at), 2)
        assert outcome.killed, (victim, at)
        committed = committed_are_whole(run_dir)
        assert set(committed) <= {1, 2}

        written = nothing_is_missing(run_dir, 2)
        finished += written
        assert list(finish_saves(run_dir)) == [checkpoint_folder(run_dir, 2)] * written, (
            victim,
            at,
        )
        remove_left_behind(run_dir)
        step = resumed_step(run_dir)
        assert step == (2 if written or 2 in committed else before), (victim, at)
        reached.add(step)
        if step != 2:
            assert set(save(FaultyDisk(run_dir), 2).endings.values()) == {None}
        assert set(save(FaultyDisk(run_dir), 3).endings.values()) == {None}
        assert resumed_step(run_dir) == 3
        assert [folder.name for folder in checkpoints_folder(run_dir).iterdir()] == [
            "step-00000003"
        ]
    assert reached == {before, 2}
    # Of rank 0: from the manifest to the rename.
    assert finished >= 8


@pytest.mark.parametrize("fault", ["full", "read-only", "deleted"])
def test_a_disk_that_fails_at_any_change_is_said_and_the_next_save_succeeds(
    tmp_path: Path, fault: Fault
) -> None:
    for victim, at in places(tmp_path, saved=True):
        run_dir = tmp_path / f"{victim}-{at}"
        prepared(run_dir, saved=True)
        retention = Retention(run_dir, CheckpointConfig(keep_last=1))
        retention.apply(notice=pytest.fail)
        disk = FaultyDisk(run_dir, fault, victim, at)
        outcome = save(disk, 2, retention)
        failures = [ending for ending in outcome.endings.values() if ending is not None]
        assert all(isinstance(failure, CheckpointError) for failure in failures), (victim, at)
        steps = committed_are_whole(run_dir)
        if fault == "deleted":
            assert failures or outcome.said or steps == [2], (victim, at)
        else:
            assert failures, (victim, at)
            assert any("space left" in str(f) or "Read-only" in str(f) for f in failures)
            assert resumed_step(run_dir) in (1, 2)
        # The same process goes on, and the disk works again.
        again = save(FaultyDisk(run_dir), 3, retention)
        assert set(again.endings.values()) == {None}, (victim, at)
        assert resumed_step(run_dir) == 3
        remove_left_behind(run_dir)
        assert committed_steps(run_dir) == [3]


def test_what_a_power_cut_could_undo_is_forced_to_the_disk_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def noted_fsync(descriptor: int) -> None:
        done.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_rename(old: Path, new: Path) -> None:
        done.append(("rename", new.name))
        rename(old, new)

    def noted_unlink(path: Path, **options: Any) -> None:
        done.append(("unlink", os.path.basename(path)))
        unlink(path, **options)

    for name, noted in {
        "fsync": noted_fsync,
        "rename": noted_rename,
        "unlink": noted_unlink,
    }.items():
        monkeypatch.setattr(os, name, noted)
    run_dir = tmp_path / "run"
    save_checkpoint(run_dir, snapshot(1), ranks=OneRank())
    committed = done.index(("rename", "step-00000001"))
    assert {
        ("sync", "run"),
        ("sync", "manifest.json"),
        ("sync", "rank-00000.safetensors"),
        ("sync", "step-00000001.partial"),
    } <= set(done[:committed])
    assert done[committed - 1] == ("sync", "step-00000001.partial")
    assert done[committed + 1] == ("sync", "checkpoints")

    save_checkpoint(run_dir, snapshot(2), ranks=OneRank())
    del done[:]
    assert Retention(run_dir, CheckpointConfig(keep_last=1)).apply(notice=pytest.fail) == [1]
    assert done[:2] == [("rename", "step-00000001.removed"), ("sync", "checkpoints")]
    assert done[2][0] == "unlink"
