"""One run holds its folder, also after somebody deleted it."""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from written_checkpoint import OneRank, RankOf, stage_as_ranks

from mamba_dist.checkpoint import store
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps, staging_folder
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.errors import CheckpointError, TrainingError
from mamba_dist.telemetry.starts import LOCK
from mamba_dist.train import run_folder
from mamba_dist.train.run_folder import HeldFolder


def taken(run_dir: Path) -> HeldFolder:
    folder = HeldFolder(run_dir, OneRank())
    folder.take()
    return folder


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = taken(tmp_path / "run")
    staged = staging_folder(tmp_path / "run", 3)
    staged.mkdir(parents=True)
    with pytest.raises(TrainingError, match="another run is training in it"):
        taken(tmp_path / "run")
    # Nothing of the first is cleaned away by the one that is refused.
    assert staged.is_dir()
    first.require()
    first.release()
    second = taken(tmp_path / "run")
    second.settle()
    assert not staged.exists()
    second.release()


def test_a_start_commits_a_save_whose_parts_are_all_written_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage_as_ranks(tmp_path, 3, 2)
    stage_as_ranks(tmp_path, 6, 2, written=[1])
    taken(tmp_path).settle()
    folder = checkpoint_folder(tmp_path, 3)
    assert list(checkpoint_damage(folder, read_manifest(folder))) == []
    assert committed_steps(tmp_path) == [3]
    assert [record.message for record in caplog.records] == [
        f"committed {folder}, all of which an interrupted save left",
        "removed step-00000006.partial, which an interrupted save left behind",
    ]


def test_what_nobody_can_say_to_be_unfinished_is_left_and_refuses_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the other rank too, with the same exit code."""

    class Told(RankOf):
        def from_first(self, values: Sequence[int]) -> list[int]:
            codes.extend(values if self.rank == 0 else [])
            return codes

    codes: list[int] = []
    staged = stage_as_ranks(tmp_path, 3, 2)
    record = staged / "rank-00001.safetensors.json"
    opened = Path.open

    def away(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == record:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", away)
        for rank in (0, 1):
            with pytest.raises(CheckpointError) as raised:
                HeldFolder(tmp_path, Told(rank, 2)).settle()
            assert raised.value.exit_code == 75
            assert ("Stale file handle" in str(raised.value)) == (rank == 0)
    assert record.exists()

    begun = staged / "begun.json"
    written = json.loads(begun.read_text())["manifest"] | {"of_the_future": 1}
    text = json.dumps(written, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    begun.write_text(f'{{"manifest":{text},"sha256":"{digest}"}}')
    with pytest.raises(CheckpointError, match="use the version of mamba-dist that wrote it"):
        HeldFolder(tmp_path, OneRank()).settle()
    assert begun.exists()


def test_a_disk_without_room_for_the_commit_is_said_with_what_to_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    staged = stage_as_ranks(tmp_path, 3, 1)
    monkeypatch.setattr(store, "write_synced", full)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        HeldFolder(tmp_path, OneRank()).settle()
    assert f"{staged}: an interrupted save left all of it" in str(raised.value)


def test_leftovers_that_cannot_be_removed_are_said_and_hinder_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A checkpoint that was moved to another disk, and linked back, when it was to be deleted.
    (tmp_path / "elsewhere").mkdir()
    for step in (3, 6):
        staging_folder(tmp_path, step).mkdir(parents=True)
    link = staging_folder(tmp_path, 9).with_suffix(".removed")
    link.symlink_to(tmp_path / "elsewhere")
    rmtree = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path.name == "step-00000003.partial":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    HeldFolder(tmp_path, OneRank()).settle()
    assert [path.name for path in link.parent.iterdir()] == ["step-00000003.partial"]
    assert (tmp_path / "elsewhere").exists()
    assert "step-00000003.partial, which an interrupted save left behind, cannot be removed" in (
        caplog.text
    )


def test_a_deleted_folder_is_held_again(tmp_path: Path) -> None:
    first = taken(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    first.require()
    with pytest.raises(TrainingError, match="another run is training in it"):
        taken(tmp_path / "run")
    first.require()
    first.release()


def test_a_run_whose_folder_was_deleted_and_taken_by_another_ends(tmp_path: Path) -> None:
    first = taken(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    second = taken(tmp_path / "run")
    with pytest.raises(TrainingError, match="was deleted, and another run is training in it"):
        first.require()
    second.require()
    second.release()


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written or locked \(Not a directory\)"):
        taken(tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_made_again_is_no_reason_to_end(tmp_path: Path) -> None:
    first = taken(tmp_path / "above" / "run")
    shutil.rmtree(tmp_path / "above")
    (tmp_path / "above").write_text("")
    first.require()
    first.release()


def test_a_rank_knows_whether_it_sees_what_the_first_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the lock of an earlier run, in a folder of the same name on its own disk."""
    monkeypatch.setattr(run_folder, "_APPEARS_WITHIN_S", 0.0)
    taken(tmp_path / "run").release()
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)
    other = HeldFolder(tmp_path / "run", RankOf(1, 2))
    other.take()
    assert not other.is_seen()
    first = taken(tmp_path / "run")
    assert other.is_seen()
    monkeypatch.setattr(secrets, "randbits", lambda _: 8)
    with pytest.raises(TrainingError):
        taken(tmp_path / "run")
    assert other.is_seen(), "a start that is refused changes nothing"
    first.release()


def test_somebody_who_asks_for_the_state_of_the_lock_stops_no_start(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        taken(tmp_path).release()
