"""One run holds its folder, also after somebody deleted it."""

import fcntl
import secrets
import shutil
import threading
from pathlib import Path

import pytest
from written_checkpoint import OneRank, RankOf, stage_as_ranks

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps, staging_folder
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.errors import TrainingError
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
    assert not staged.exists()
    second.release()


def test_a_start_commits_a_save_whose_parts_are_all_written_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage_as_ranks(tmp_path, 3, 2)
    stage_as_ranks(tmp_path, 6, 2, written=[1])
    taken(tmp_path).release()
    folder = checkpoint_folder(tmp_path, 3)
    assert list(checkpoint_damage(folder, read_manifest(folder))) == []
    assert committed_steps(tmp_path) == [3]
    assert [record.message for record in caplog.records] == [
        f"committed {folder}, all of which an interrupted save left",
        "removed step-00000006.partial, which an interrupted save left behind",
    ]


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
