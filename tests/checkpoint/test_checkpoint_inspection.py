"""What a checkpoint holds: read in blocks across ranks, measured, and placed in its data."""

import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from written_checkpoint import state_of, write_as_ranks

from mamba_dist.checkpoint.inspection import (
    find_folder,
    open_sized,
    parameter_statistics,
    segment_descriptions,
    source_cursors,
    state_bytes,
)
from mamba_dist.checkpoint.layout import staging_folder
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.errors import CheckpointError


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_blocks_are_the_state_in_order_however_it_was_cut(
    tmp_path: Path, size: int, flat: bool
) -> None:
    reader = CheckpointReader(write_as_ranks(tmp_path, 5, size, flat=flat))
    for name, state in state_of(5).items():
        for kind in STATE_KINDS:
            whole = state[kind].flatten()
            for numel in (1, 2, 4, 15, 99):
                blocks = list(reader.blocks(name, kind, numel=numel))
                assert [b.tolist() for b in blocks] == [b.tolist() for b in whole.split(numel)]


def test_a_block_of_changed_bytes_is_refused(tmp_path: Path) -> None:
    folder = write_as_ranks(tmp_path, 5, 2)
    victim = folder / "rank-00001.safetensors"
    contents = bytearray(victim.read_bytes())
    contents[-1] ^= 1
    victim.write_bytes(contents)
    reader = open_sized(folder)
    with pytest.raises(CheckpointError, match=r"rank-00001.*does not hash"):
        list(parameter_statistics(reader, block_numel=2))


def test_statistics_join_the_fragments_of_all_ranks(tmp_path: Path) -> None:
    state = state_of(5)
    state["b"]["exp_avg"][2] = math.nan
    state["b"]["exp_avg"][6] = -math.inf
    reader = CheckpointReader(write_as_ranks(tmp_path, 5, 3, state=state, flat=True))
    advanced: list[int] = []
    rows = list(parameter_statistics(reader, block_numel=4, advance=advanced.append))
    assert sum(advanced) == state_bytes(reader.manifest)
    assert {row.name: tuple(row.shape) for row in rows} == {
        name: tuple(kinds["master"].shape) for name, kinds in state.items()
    }
    for row in rows:
        assert row.dtype == "float32"
        for kind in STATE_KINDS:
            if (row.name, kind) == ("b", "exp_avg"):
                assert (row.norms[kind], row.non_finite[kind]) == (None, 2)
                continue
            expected = float(state[row.name][kind].double().norm())
            assert row.norms[kind] == pytest.approx(expected, rel=1e-12)
            assert row.non_finite[kind] == 0


def source(name: str, *, weight: float, samples: int, max_epochs: int | None = None):
    content = SourceContent(1, 1, 1, 1, 1, "0", 9, 0, 0.9, 0.1)
    return SourceRecord(f"data/{name}", name * 9, weight, max_epochs, samples, content)


def test_cursors_are_counted_over_all_segments(tmp_path: Path) -> None:
    one = source("x", weight=1.0, samples=5)
    few = source("y", weight=3.0, samples=7, max_epochs=1)
    alone = RunOrder([first_segment([one], global_batch_size=4)], seed=3, shuffle=True)
    both = alone.changed(step=2, sources=[replace(one, weight=1.0), few], global_batch_size=6)
    back = both.changed(step=4, sources=[one], global_batch_size=2)
    folder = write_as_ranks(
        tmp_path, 5, 1, segments=back.segments, next_sample=back.positions(5).start
    )
    manifest = read_manifest(folder)
    expected: Counter[str] = Counter()
    for position in range(back.positions(5).start):
        sample = back.locate(position)
        expected[back.segments[sample.segment].sources[sample.source].path] += 1
    cursors = {cursor.path: cursor for cursor in source_cursors(manifest)}
    assert {path: cursor.samples_read for path, cursor in cursors.items()} == dict(expected)
    x, y = cursors["data/x"], cursors["data/y"]
    assert (x.epoch, x.epoch_share) == (x.samples_read // 5, x.samples_read % 5 / 5)
    assert y.exhausted
    assert not x.exhausted
    segments = segment_descriptions(manifest)
    assert [(s.first_step, s.end_step) for s in segments] == [(0, 2), (2, 4), (4, None)]
    assert [s.share for s in segments[1].sources] == [0.25, 0.75]


def test_a_checkpoint_older_than_mixtures_has_no_segments_and_no_cursor(tmp_path: Path) -> None:
    manifest = read_manifest(write_as_ranks(tmp_path, 5, 1))
    assert segment_descriptions(manifest) == []
    assert source_cursors(manifest) == []


def test_a_run_folder_is_its_newest_whole_checkpoint_or_the_step_asked_for(
    tmp_path: Path,
) -> None:
    folders = [write_as_ranks(tmp_path, step, 2) for step in (1, 2, 3)]
    os.truncate(folders[2] / "rank-00001.safetensors", 9)
    notices: list[str] = []

    def found(path: Path, step: int | None = None, *, whole: bool = True) -> Path:
        return find_folder(path, step=step, whole=whole, notice=notices.append)

    assert found(tmp_path) == folders[1]
    assert "rank-00001" in "".join(notices)
    assert found(tmp_path, whole=False) == folders[2]
    assert found(tmp_path, 1) == folders[0]
    assert found(folders[0]) == folders[0]
    with pytest.raises(CheckpointError, match=r"step 7; expected one of 1, 2, 3"):
        found(tmp_path, 7)
    with pytest.raises(CheckpointError, match="--step needs a run folder"):
        found(folders[0], 1)
    with pytest.raises(CheckpointError, match=r"rank-00001\S* has 9 bytes"):
        open_sized(folders[2])


def test_what_an_interruption_left_is_no_checkpoint(tmp_path: Path) -> None:
    staging = staging_folder(tmp_path, 2)
    write_as_ranks(tmp_path, 2, 1).rename(staging)
    for path in (staging, tmp_path):
        with pytest.raises(CheckpointError, match=r"step-00000002\.partial.*left behind"):
            find_folder(path, step=None, whole=True, notice=print)
