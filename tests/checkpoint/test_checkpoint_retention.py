"""Retention: what the rules keep together, and that the newest whole checkpoint always stays."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_checkpoint import OneRank, snapshot

from mamba_dist.checkpoint import layout
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.reader import open_checkpoint
from mamba_dist.checkpoint.retention import Kept, Retention, steps_to_remove
from mamba_dist.checkpoint.store import save_checkpoint
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.errors import CheckpointError

HOUR_S = 3600.0


def save(run_dir: Path, step: int, *, hour: float | None = None, loss: float | None = None) -> None:
    saved_at = None if hour is None else hour * HOUR_S
    save_checkpoint(run_dir, snapshot(step, saved_at=saved_at, val_loss=loss), ranks=OneRank())


def test_the_four_rules_keep_together(tmp_path: Path) -> None:
    policy = CheckpointConfig(keep_last=2, keep_every_steps=4, keep_every_hours=3, keep_best=2)
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 2.5, 6: 3.5, 7: None, 8: 2.9, 9: 3.9, 10: 3.8}
    retention = Retention(tmp_path, policy)
    kept_after = {}
    for step, loss in losses.items():
        save(tmp_path, step, hour=float(step), loss=loss)
        retention.apply(notice=pytest.fail)
        kept_after[step] = committed_steps(tmp_path)
    # Hours keep 1, 4, 7 and 10; steps 4 and 8; the last two 9 and 10; the best are 5 and 8.
    assert kept_after[10] == [1, 4, 5, 7, 8, 9, 10]
    # Then the best were 2 and 5, and 6 was one of the last.
    assert kept_after[7] == [1, 2, 4, 5, 6, 7]
    # A new process, which reads what it needs from the manifests, comes to the same.
    assert Retention(tmp_path, policy).apply(notice=pytest.fail) == []
    assert read_manifest(checkpoint_folder(tmp_path, 5)).val_loss == 2.5
    last_alone = Retention(tmp_path, CheckpointConfig(keep_last=1))
    assert last_alone.apply(notice=pytest.fail) == [1, 4, 5, 7, 8, 9]


def test_checkpoints_from_before_times_and_losses_were_kept_are_kept_by_their_steps(
    tmp_path: Path,
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    policy = CheckpointConfig(keep_last=1, keep_every_steps=2, keep_every_hours=1, keep_best=1)
    assert Retention(tmp_path, policy).apply(notice=pytest.fail) == [1, 3]


@given(
    losses=st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=12),
    hours=st.lists(st.none() | st.floats(-9, 99), min_size=12, max_size=12),
    keep_last=st.integers(1, 3),
    keep_every_steps=st.none() | st.integers(1, 5),
    keep_every_hours=st.none() | st.floats(0.1, 30),
    keep_best=st.none() | st.integers(1, 3),
)
def test_a_rule_keeps_the_same_whether_others_were_deleted_before_or_not(
    losses: list[float | None], hours: list[float | None], **rules
) -> None:
    policy = CheckpointConfig(**rules)
    every = [
        Kept(step, None if hour is None else hour * HOUR_S, loss)
        for step, (loss, hour) in enumerate(zip(losses, hours, strict=False), 1)
    ]
    left: list[Kept] = []
    for one in every:
        left.append(one)
        doomed = steps_to_remove(left, policy)
        assert one.step not in doomed
        left = [other for other in left if other.step not in doomed]
    at_once = steps_to_remove(every, policy)
    assert [one.step for one in left] == [k.step for k in every if k.step not in at_once]


@pytest.mark.parametrize("fault", ["missing", "cut", "manifest"])
def test_a_newest_that_is_not_whole_does_not_cost_the_newest_whole_one(
    tmp_path: Path, fault: str
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    victim = checkpoint_folder(tmp_path, 3) / "rank-00000.safetensors"
    if fault == "missing":
        victim.unlink()
    elif fault == "cut":
        os.truncate(victim, 9)
    else:
        victim = checkpoint_folder(tmp_path, 3) / "manifest.json"
        victim.write_text("{}")
    said: list[str] = []
    retention = Retention(tmp_path, CheckpointConfig(keep_last=1))
    assert retention.apply(notice=said.append) == [1]
    assert retention.apply(notice=said.append) == []
    assert committed_steps(tmp_path) == [2, 3]
    assert len(said) == 1
    assert str(victim) in said[0]
    assert open_checkpoint(tmp_path, notice=said.append).step == 2


def test_what_cannot_be_deleted_is_an_error_of_checkpoints_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(*names: object) -> None:
        raise OSError(30, "Read-only file system")

    retention = Retention(tmp_path, CheckpointConfig(keep_last=1))
    with monkeypatch.context() as patched:
        patched.setattr(layout.os, "rename", refuse)
        with pytest.raises(CheckpointError, match=r"step-00000001.*Read-only file system"):
            retention.apply(notice=pytest.fail)
    assert retention.apply(notice=pytest.fail) == [1]


def test_one_that_cannot_be_emptied_holds_up_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    remove_tree = layout.shutil.rmtree

    def busy(folder: Path) -> None:
        if folder.name.startswith("step-00000001"):
            raise OSError(16, "Device or resource busy")
        remove_tree(folder)

    retention = Retention(tmp_path, CheckpointConfig(keep_last=1))
    with monkeypatch.context() as patched:
        patched.setattr(layout.shutil, "rmtree", busy)
        with pytest.raises(CheckpointError, match=r"step-00000001.*busy"):
            retention.apply(notice=pytest.fail)
        assert committed_steps(tmp_path) == [3]
    save(tmp_path, 4)
    staged = layout.make_staging_folder(tmp_path, 5)
    assert retention.apply(notice=pytest.fail) == [3]
    folders = sorted(entry.name for entry in layout.checkpoints_folder(tmp_path).iterdir())
    assert folders == ["step-00000004", staged.name]


def test_a_step_that_is_saved_again_counts_by_its_new_loss(tmp_path: Path) -> None:
    retention = Retention(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    save(tmp_path, 1, loss=3.0)
    save(tmp_path, 2, loss=2.0)
    retention.apply(notice=pytest.fail)
    # As a rollback to step 1 does.
    layout.set_aside(tmp_path, 2, suffix=".abandoned")
    retention.forget(after=1)
    save(tmp_path, 2, loss=4.0)
    save(tmp_path, 3, loss=3.5)
    retention.apply(notice=pytest.fail)
    assert committed_steps(tmp_path) == [3]
