"""Saves beside training: what is written, who waits, and what a failure or a kill leaves."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import clean_environment
from written_checkpoint import OneRank, fragments_of, snapshot, state_of

from mamba_dist.checkpoint import background, rank_file, retention
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps, staging_folder
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.store import save_checkpoint
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.errors import CheckpointError
from mamba_dist.train import saver
from mamba_dist.train.saver import Saver


class Run:
    """Steps of a run on one rank, whose state is that of `state_of(step)`."""

    def __init__(self, run_dir: Path, **config: Any) -> None:
        self.step = 0
        self.state = state_of(0)
        self.run_dir = run_dir
        self.saver = Saver(
            run_dir,
            CheckpointConfig(**{"save_mode": "async", **config}),
            fragments=self.fragments,
            ranks=OneRank(),
        )

    def fragments(self):
        return fragments_of(self.step, state=self.state)

    def train(self, steps: int = 1) -> None:
        """Changes the live state in place, as an update does."""
        for _ in range(steps):
            self.saver.hear(self.saver.vote)
            self.step += 1
            self.saver.hold_update()
            for name, kinds in state_of(self.step).items():
                for kind, tensor in kinds.items():
                    self.state[name][kind].copy_(tensor)

    def save(self, *, must_succeed: bool = False) -> None:
        taken = snapshot(self.step, fragments=self.fragments())
        self.saver.save(taken, must_succeed=must_succeed)

    def train_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(2000):
            if condition():
                return
            self.train()
            threading.Event().wait(0.005)
        pytest.fail("2000 steps were not enough")


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writers wait until the event is set, at the end of the block at the latest."""
    go_on = threading.Event()
    real = rank_file.write_tensors

    def slow(*arguments: Any, **options: Any) -> Any:
        assert go_on.wait(60)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(rank_file, "write_tensors", slow)
        yield go_on
        go_on.set()


def test_what_is_written_beside_training_is_the_state_at_the_save_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    saved: list[int] = []
    # The second copy goes where the first was.
    for _ in range(2):
        with held_back(monkeypatch) as go_on:
            run.train(3)
            run.save()
            saved.append(run.step)
            run.train(4)
            assert committed_steps(run.run_dir) == saved[:-1]
            assert staging_folder(run.run_dir, saved[-1]).is_dir()
            go_on.set()
            run.train_until(lambda: committed_steps(run.run_dir) == saved)
    save_checkpoint(tmp_path / "blocking", snapshot(saved[-1]), ranks=OneRank())
    ours, theirs = (checkpoint_folder(d, saved[-1]) for d in (run.run_dir, tmp_path / "blocking"))
    assert sorted(f.name for f in ours.iterdir()) == sorted(f.name for f in theirs.iterdir())
    for file in theirs.iterdir():
        assert (ours / file.name).read_bytes() == file.read_bytes()


def test_a_save_that_falls_due_meanwhile_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, keep_last=1)
    run.train()
    with held_back(monkeypatch) as go_on, caplog.at_level(logging.INFO):
        run.save()
        run.train()
        due = threading.Thread(target=run.save)
        due.start()
        due.join(0.2)
        assert due.is_alive()
        assert committed_steps(tmp_path) == []
        go_on.set()
        due.join(60)
        assert "for the save of step 1 to be written" in caplog.text
        assert committed_steps(tmp_path)[:1] == [1]
        run.saver.finish()
    # What the second has made superfluous is deleted with it.
    assert committed_steps(tmp_path) == [2]


def test_the_last_save_of_a_start_waits_for_all_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep_last=1)
    run.train()
    with held_back(monkeypatch) as go_on:
        run.save()
        threading.Timer(0.1, go_on.set).start()
        run.train()
        run.save(must_succeed=True)
        assert committed_steps(tmp_path) == [2]


@pytest.mark.parametrize("mode", ["async", "streaming"])
def test_a_save_within_a_row_of_skipped_steps_leaves_the_way_back(
    tmp_path: Path, mode: str
) -> None:
    run = Run(tmp_path, keep_last=1, save_mode=mode)

    def save_after(steps: int) -> list[int]:
        run.train(steps)
        run.save()
        run.saver.finish()
        return committed_steps(tmp_path)

    assert [save_after(2), save_after(2)] == [[2], [4]]
    run.saver.need(5)
    assert [save_after(2), save_after(2)] == [[4, 6], [4, 8]]
    run.saver.need(None)
    assert save_after(2) == [10]


@pytest.mark.parametrize("where", ["write_tensors", "commit"])
def test_a_failure_is_said_at_a_step_and_costs_that_save_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    run = Run(tmp_path)
    run.train()
    run.save()
    run.saver.finish()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rank_file if where == "write_tensors" else background, where, full)
        run.train()
        run.save()
        run.train_until(lambda: "No space left" in caplog.text)
    assert [r.levelname for r in caplog.records if "No space left" in r.message] == ["ERROR"]
    assert committed_steps(tmp_path) == [1]
    assert not staging_folder(tmp_path, 2).exists()
    run.save()
    run.saver.finish()
    assert committed_steps(tmp_path) == [1, run.step]


KILLED = """
import os, sys, threading
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_saver import Run
from mamba_dist.checkpoint import rank_file
run = Run(Path(sys.argv[1]))
run.train()
run.save()
run.saver.finish()
run.train()
write = os.fsync
os.fsync = lambda descriptor: (print("writing", flush=True), threading.Event().wait(60))
run.save()
run.train(5)
threading.Event().wait(60)
"""


def test_a_kill_meanwhile_leaves_the_one_before_and_an_unfinished_folder(tmp_path: Path) -> None:
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), *places],
        env=clean_environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.kill()
    process.communicate()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step-00000001",
        "step-00000002.partial",
    ]
    folder = checkpoint_folder(tmp_path, 1)
    assert list(checkpoint_damage(folder, read_manifest(folder))) == []


def test_a_rank_that_leaves_with_an_error_commits_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.train()
    with held_back(monkeypatch) as go_on:
        run.save()
        threading.Timer(0.1, go_on.set).start()
        run.saver.close()
        assert committed_steps(tmp_path) == [1]
    run.saver.close()


def test_a_start_deletes_what_retention_does_not_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, snapshot(step), ranks=OneRank())
    Run(tmp_path, keep_last=2).saver.clear_old()
    assert committed_steps(tmp_path) == [2, 3]


def test_a_folder_that_cannot_be_listed_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(run_dir: Path) -> list[int]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(retention, "committed_steps", away)
    for mode in ("async", "streaming"):
        run = Run(tmp_path / mode, save_mode=mode)
        run.train()
        run.save()
        run.saver.finish()
        assert committed_steps(tmp_path / mode) == [1]
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2
    assert all("checkpoints: cannot be read now (Stale file handle)" in text for text in said)


def test_a_rank_that_leaves_with_an_error_does_not_wait_for_a_disk_that_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver, "_LAST_RESORT_S", 0.2)
    run = Run(tmp_path)
    run.train()
    with held_back(monkeypatch):
        run.save()
        run.saver.close()
        assert "step 1 was not saved: " in caplog.text
        assert "nothing was written for 0.2 s" in caplog.text


class Host:
    """Memory that is as large as one says."""

    def __init__(self, run: Run, copies: float) -> None:
        needed = sum(3 * 4 * one.master.numel() for one in run.fragments())
        run.saver._available = lambda: int(copies * needed)


def test_without_memory_for_a_copy_saves_hold_up_training_and_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, save_mode="auto")
    Host(run, copies=1.2)
    run.train()
    run.save()
    assert committed_steps(tmp_path) == [1]
    run.train()
    run.save()
    assert committed_steps(tmp_path) == [1, 2]
    assert [r.levelname for r in caplog.records if "no memory for a copy" in r.message] == [
        "WARNING"
    ]


def test_async_by_name_is_refused_without_memory_for_a_copy(tmp_path: Path) -> None:
    run = Run(tmp_path, save_mode="async")
    Host(run, copies=1.2)
    with pytest.raises(CheckpointError, match="save_mode is async, but there is no memory"):
        run.train()
    roomy = Run(tmp_path, save_mode="async")
    Host(roomy, copies=1.4)
    roomy.train()


def test_memory_that_cannot_be_taken_in_the_end_is_no_reason_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    run = Run(tmp_path, save_mode="auto")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", refused)
        run.train()
        run.saver._taking.join()
    run.save()
    assert committed_steps(tmp_path) == [1]
    assert "no memory for a copy of the training state (can't allocate memory)" in caplog.text


def test_streaming_takes_no_memory_for_a_copy(tmp_path: Path) -> None:
    run = Run(tmp_path, save_mode="streaming")
    Host(run, copies=0)
    run.train()
    run.save()
    assert committed_steps(tmp_path) == [1]
