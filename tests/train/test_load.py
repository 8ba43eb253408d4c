"""Loading at a resume: damage that only shows when a tensor is read leads to the one before."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from saved_run import save_run
from written_checkpoint import OneRank

from mamba_dist.checkpoint import layout
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.config.schema import MambaConfig, RunConfig, TrainingConfig
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.base import STATE_KINDS, FragmentReader
from mamba_dist.errors import CheckpointError, UnreadableCheckpointError
from mamba_dist.train.build import Run
from mamba_dist.train.guard import BadRow
from mamba_dist.train.rollback import Rollbacks
from mamba_dist.train.state import load, starting_point

CONTENT = SourceContent(1_234_567, 10, 99, 3, 2, "a" * 64, 320, 0, 0.9, 0.1)
SOURCE = SourceRecord("data/web", "f" * 64, 1.0, None, 100, CONTENT)
NUMEL = 8


class OneWorld(OneRank):
    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return [float(value) for value in values]

    def barrier(self) -> None:
        pass


class Loading:
    """An engine of one parameter."""

    def __init__(self) -> None:
        self.state = {kind: torch.full((NUMEL,), -1.0) for kind in STATE_KINDS}
        self.adam_steps = -1
        self.loads = 0

    def load_fragments(self, reader: FragmentReader, *, adam_steps: int) -> None:
        self.loads += 1
        self.adam_steps = adam_steps
        for kind, own in self.state.items():
            own.copy_(reader.read("a", kind, start=0, numel=NUMEL))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the run says, also after a test that set up the package's own handler."""
    package = logging.getLogger("mamba_dist")
    before = package.propagate
    package.propagate = True
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        yield caplog
    package.propagate = before


def prepared(run_dir: Path, *steps: int) -> tuple[RunConfig, RunOrder]:
    config = RunConfig(
        model=MambaConfig(d_model=16, n_layers=1, vocab_size=320),
        training=TrainingConfig(
            run_dir=str(run_dir), warmup_steps=1, global_batch_size=32, max_steps=9
        ),
    )
    order = RunOrder([first_segment([SOURCE], global_batch_size=32)], seed=0, shuffle=True)
    for step in steps:
        save_run(
            run_dir, config, order, step=step, parameters={"a": torch.full((NUMEL,), float(step))}
        )
    return config, order


def flip_last_byte(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


def rank_file_of(run_dir: Path, step: int) -> Path:
    return checkpoint_folder(run_dir, step) / "rank-00000.safetensors"


def test_a_flipped_byte_of_a_moment_leads_to_the_checkpoint_before(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    config, order = prepared(tmp_path, 2, 4)
    flip_last_byte(rank_file_of(tmp_path, 4))
    world, engine = OneWorld(), Loading()
    start = starting_point(config, world=world, fresh=order)
    assert start.progress.step == 4
    assert committed_steps(tmp_path) == [2, 4]

    start = load(start, engine, config, world=world, fresh=order)
    assert start.progress.step == 2
    assert start.progress.next_sample == order.positions(2).start
    assert engine.adam_steps == 2
    for tensor in engine.state.values():
        assert torch.equal(tensor, torch.full((NUMEL,), 2.0))
    assert f"passing over step 4: {rank_file_of(tmp_path, 4)}" in said.text
    assert "resumed after step 2" in said.text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004.damaged",
    ]


def test_if_none_is_whole_the_run_ends_and_nothing_is_set_aside(tmp_path: Path) -> None:
    config, order = prepared(tmp_path, 2, 4)
    for step in (2, 4):
        flip_last_byte(rank_file_of(tmp_path, step))
    world, engine = OneWorld(), Loading()
    start = starting_point(config, world=world, fresh=order)
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load(start, engine, config, world=world, fresh=order)
    assert engine.loads == 2
    assert committed_steps(tmp_path) == [2, 4]


class OtherFails(OneWorld):
    """Rank 0 of two, the other of which says yes to a question after the first load."""

    def __init__(self, engine: Loading, question: int) -> None:
        super().__init__()
        self._engine = engine
        self._question = question
        self._asked = 0

    def any_rank(self, flag: bool) -> bool:
        self._asked += self._engine.loads == 1
        return flag or (self._engine.loads == 1 and self._asked == self._question)


def test_what_another_rank_cannot_read_now_ends_the_start_on_this_one_too(tmp_path: Path) -> None:
    config, order = prepared(tmp_path, 2, 4)
    engine = Loading()
    start = starting_point(config, world=OneWorld(), fresh=order)
    with pytest.raises(UnreadableCheckpointError, match="another rank cannot read"):
        load(start, engine, config, world=OtherFails(engine, 1), fresh=order)
    assert committed_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_what_cannot_be_read_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Each opening of the file is the one that fails, in a start of its own."""
    config, order = prepared(tmp_path, 2, 4)
    victim, opened = checkpoint_folder(tmp_path, 4) / name, Path.open

    def failing_at(place: int) -> int:
        """How often it was opened."""
        count = 0

        def fail(path: Path, *arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += path == victim
            if path == victim and count == place:
                raise OSError(number, os.strerror(number))
            return opened(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", fail)
            world, engine = OneWorld(), Loading()
            load(
                starting_point(config, world=world, fresh=order),
                engine,
                config,
                world=world,
                fresh=order,
            )
        return count

    openings = failing_at(0)
    assert openings >= 1
    for place in range(1, openings + 1):
        with pytest.raises(
            UnreadableCheckpointError, match=f"{name}: cannot be read now"
        ) as raised:
            failing_at(place)
        assert raised.value.exit_code == 75
        assert committed_steps(tmp_path) == [2, 4]


def test_damage_that_another_rank_meets_leads_this_one_to_the_same_checkpoint(
    tmp_path: Path,
) -> None:
    config, order = prepared(tmp_path, 2, 4)
    engine = Loading()
    start = starting_point(config, world=OneWorld(), fresh=order)
    start = load(start, engine, config, world=OtherFails(engine, 2), fresh=order)
    assert engine.loads == 2
    assert start.progress.step == 2
    assert torch.equal(engine.state["master"], torch.full((NUMEL,), 2.0))


def test_damage_that_cannot_be_set_aside_ends_the_start_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(30, "Read-only file system")

    config, order = prepared(tmp_path, 2, 4)
    flip_last_byte(rank_file_of(tmp_path, 4))
    start = starting_point(config, world=OneWorld(), fresh=order)
    monkeypatch.setattr(layout.os, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"after step 2 cannot be set aside .*Read-only"):
        load(start, Loading(), config, world=OneWorld(), fresh=order)


class Rotting(Loading):
    """An engine under which a checkpoint that was just verified is damaged."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_fragments(self, reader: FragmentReader, *, adam_steps: int) -> None:
        flip_last_byte(self._path)
        super().load_fragments(reader, adam_steps=adam_steps)


@pytest.mark.parametrize("met_here", [True, False])
def test_a_rollback_whose_checkpoint_is_damaged_meanwhile_ends_on_all_ranks(
    tmp_path: Path, met_here: bool
) -> None:
    config, order = prepared(tmp_path, 2)
    # In the last moment, that is, whose tensor is loaded last.
    engine = Rotting(rank_file_of(tmp_path, 2)) if met_here else Loading()
    run = SimpleNamespace(
        config=config,
        engine=engine,
        world=OneWorld() if met_here else OtherFails(engine, 2),
        saver=SimpleNamespace(finish=lambda: None),
        steps=SimpleNamespace(order=order),
        start=SimpleNamespace(step=0),
    )
    row = BadRow(range(2, 4), order.positions(2), 9.0)
    with pytest.raises(UnreadableCheckpointError, match="was whole, and is not any more") as raised:
        Rollbacks(cast(Run, run)).go_back(row)
    assert engine.loads == 1
    assert (rank_file_of(tmp_path, 2).name in str(raised.value)) == met_here
    assert committed_steps(tmp_path) == [2]
