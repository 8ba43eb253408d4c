"""What the soak does to files: damage that a run must find, junk, a disk that fills up."""

import os
from pathlib import Path

import pytest
from written_checkpoint import OneRank, snapshot, stage_as_ranks

from mamba_dist.checkpoint.layout import checkpoints_folder, remove_left_behind
from mamba_dist.checkpoint.store import save_checkpoint
from mamba_dist.commands.soak import disk as disk_module
from mamba_dist.commands.soak import leftovers as leftovers_module
from mamba_dist.commands.soak.damage import damage_newest, leave_junk
from mamba_dist.commands.soak.disk import small_disk
from mamba_dist.commands.soak.leftovers import Leftovers
from mamba_dist.commands.soak.plan import DamageKind, DamagePlan
from mamba_dist.commands.soak.survey import clear_for_a_person, survey


def run_with_two(tmp_path: Path) -> Path:
    for step in (4, 8):
        save_checkpoint(tmp_path, snapshot(step), ranks=OneRank())
    return tmp_path


@pytest.mark.parametrize("kind", ["flip a byte", "truncate", "delete"])
@pytest.mark.parametrize("which", [0.0, 0.99])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_any_damage_is_one_that_verification_names(
    tmp_path: Path, kind: DamageKind, which: float, where: float
) -> None:
    run_dir = run_with_two(tmp_path)
    whole = survey(run_dir)
    assert (list(whole.whole), whole.damaged, whole.newest) == ([4, 8], {}, 8)
    step, path = damage_newest(run_dir, whole.whole, DamagePlan(kind, which, where))
    assert (step, path.name) == (8, "manifest.json" if which == 0 else "rank-00000.safetensors")
    found = survey(run_dir)
    assert found.whole == {4: whole.whole[4]}
    assert str(path) in found.damaged[8]


def test_junk_looks_unfinished_and_is_cleared_by_a_start(tmp_path: Path) -> None:
    run_dir = run_with_two(tmp_path)
    names = leave_junk(run_dir, survey(run_dir).whole)
    found = survey(run_dir)
    assert sorted(found.left_behind) == sorted(names)
    # One of them holds all of a checkpoint, but of another step than it is named after.
    assert (list(found.whole), found.written, found.newest) == ([4, 8], (), 8)
    assert sorted(remove_left_behind(run_dir).removed) == sorted(names)
    leave_junk(tmp_path / "fresh", {})
    assert len(survey(tmp_path / "fresh").left_behind) == 2


def test_a_save_that_a_start_commits_is_told_from_one_that_it_removes(tmp_path: Path) -> None:
    run_dir = run_with_two(tmp_path)
    stage_as_ranks(run_dir, 11, 2)
    stage_as_ranks(run_dir, 12, 2, written=[0])
    found = survey(run_dir)
    assert found.left_behind == ("step-00000011.partial", "step-00000012.partial")
    assert (found.written, found.newest, found.committed) == ((11,), 11, 8)


def test_what_is_kept_for_a_person_is_taken_away(tmp_path: Path) -> None:
    run_dir = run_with_two(tmp_path)
    folder = checkpoints_folder(run_dir)
    (folder / "step-00000008").rename(folder / "step-00000008.damaged")
    (run_dir / "hangs").mkdir()
    clear_for_a_person(run_dir)
    assert [entry.name for entry in folder.iterdir()] == ["step-00000004"]
    assert not (run_dir / "hangs").exists()


def test_a_small_disk_fills_up_and_its_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder) as disk:
        if disk.why_not is not None:
            pytest.skip(disk.why_not)
        (folder / "old").write_bytes(bytes(100_000))
        disk.fill(left_bytes=0)
        (folder / "old").unlink()
        disk.fill(left_bytes=0)
        with (folder / "file").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space left"):
                file.write(bytes(10_000))
            disk.make_room()
            assert file.write(bytes(10_000)) == 10_000
    assert not os.path.ismount(folder)
    assert [entry.name for entry in folder.iterdir()] == ["file"]


def test_where_nothing_may_be_mounted_the_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "_run", lambda *command: "mount: only root can do that")
    with small_disk(tmp_path / "disk") as disk:
        assert disk.why_not is not None
        assert "only root can do that" in disk.why_not
        assert disk.folder.is_dir()


def test_what_a_launch_leaves_in_memory_or_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, temporary = tmp_path / "shm", tmp_path / "tmp"
    for folder in (memory, temporary):
        folder.mkdir()
    monkeypatch.setattr(leftovers_module, "_SHARED_MEMORY", memory)
    monkeypatch.setattr(leftovers_module, "_PATIENCE_S", 0.0)
    (memory / "before").touch()
    leftovers = Leftovers()
    (temporary / "torchelastic_x").mkdir()
    with (memory / "in-use").open("w"):
        assert leftovers.faults(temporary) == []
    (temporary / "mine").touch()
    assert leftovers.faults(temporary) == [
        f"left in {memory}: ['in-use']",
        "left in its temporary folder: ['mine']",
    ]
