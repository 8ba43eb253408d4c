"""Checkpoints on a real disk: the committed is whole, the damaged is named and never loaded."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_checkpoint import (
    SHAPES,
    OneRank,
    RankOf,
    fragments_of,
    run_config,
    snapshot,
    stage_as_ranks,
    state_of,
    write_as_ranks,
)

from mamba_dist.checkpoint import rank_file
from mamba_dist.checkpoint.layout import (
    MANIFEST,
    checkpoint_folder,
    committed_steps,
    remove_left_behind,
    staging_folder,
)
from mamba_dist.checkpoint.manifest import (
    CheckpointManifest,
    FragmentRecord,
    manifest_text,
    read_manifest,
)
from mamba_dist.checkpoint.reader import (
    find_checkpoint,
    open_checkpoint,
    require_same_model,
    set_aside_newer,
)
from mamba_dist.checkpoint.reshard import pieces_of_range, require_exact_cover
from mamba_dist.checkpoint.retention import Retention
from mamba_dist.checkpoint.store import finish_saves, save_checkpoint
from mamba_dist.config.schema import CheckpointConfig
from mamba_dist.engine.base import flat_share
from mamba_dist.errors import CheckpointError, OtherVersionError


def save(run_dir: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run_dir, snapshot(step), ranks=OneRank())


def newest(run_dir: Path, notices: list[str] | None = None):
    sink = [] if notices is None else notices
    return find_checkpoint(run_dir, ranks=OneRank(), notice=sink.append)


def test_what_was_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    reader = newest(tmp_path)
    assert reader is not None
    assert reader.manifest.progress == snapshot(3).progress
    assert reader.manifest.adam_steps == 2
    assert reader.config == run_config()
    for name, state in state_of(3).items():
        for kind, tensor in state.items():
            got = reader.read(name, kind, start=0, numel=tensor.numel())
            assert torch.equal(got, tensor.flatten())
    parameters = reader.read_parameters()
    assert {n: tuple(p.shape) for n, p in parameters.items()} == SHAPES


@settings(max_examples=25, deadline=None)
@given(written=st.integers(1, 6), read=st.integers(1, 6))
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, written: int, read: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write_as_ranks(run_dir, 5, written)
    reader = newest(run_dir)
    assert reader is not None
    for name, state in state_of(5).items():
        flat = state["exp_avg"].flatten()
        for rank in range(read):
            start, numel = flat_share(flat.numel(), rank=rank, world_size=read)
            if numel:
                got = reader.read(name, "exp_avg", start=start, numel=numel)
                assert torch.equal(got, flat[start : start + numel])


def test_an_interrupted_save_is_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    staging = staging_folder(tmp_path, 2)
    staging.mkdir()
    rank_file.write_rank(staging, 0, fragments_of(2))
    assert committed_steps(tmp_path) == [1]
    reader = newest(tmp_path)
    assert reader is not None
    assert reader.step == 1
    assert remove_left_behind(tmp_path).removed == ["step-00000002.partial"]
    assert not staging.exists()
    save(tmp_path, 2)
    assert committed_steps(tmp_path) == [1, 2]


def test_a_save_that_lacks_nothing_but_the_commit_is_committed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    staged = stage_as_ranks(tmp_path, 2, 3, val_loss=1.5)
    assert list(finish_saves(tmp_path)) == [checkpoint_folder(tmp_path, 2)]
    assert not staged.exists()
    whole = read_manifest(write_as_ranks(tmp_path / "other", 2, 3, val_loss=1.5))
    assert read_manifest(checkpoint_folder(tmp_path, 2)) == whole
    assert sorted(p.name for p in files_of(checkpoint_folder(tmp_path, 2))) == [
        "manifest.json",
        *(f"rank-{rank:05d}.safetensors" for rank in range(3)),
    ]
    assert list(finish_saves(tmp_path)) == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda s: (s / "rank-00001.safetensors.json").unlink(), id="a part not there"),
        pytest.param(lambda s: (s / "begun.json").unlink(), id="what it began with not there"),
        pytest.param(lambda s: os.truncate(s / "rank-00001.safetensors", 99), id="a part cut off"),
        pytest.param(lambda s: os.truncate(s / "begun.json", 99), id="its beginning cut off"),
        pytest.param(lambda s: s.rename(s.with_name("step-00000007.partial")), id="another step's"),
        pytest.param(
            lambda s: write_as_ranks(s.parents[1], 7, 1).rename(s.parent / "step-00000002"),
            id="committed already",
        ),
    ],
)
def test_a_save_that_lacks_more_is_not(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(stage_as_ranks(tmp_path, 2, 2))
    assert list(finish_saves(tmp_path)) == []
    assert len(remove_left_behind(tmp_path).removed) == 1


def test_a_step_that_was_set_aside_is_not_committed_by_a_later_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    stage_as_ranks(tmp_path, 2, 2)
    set_aside_newer(tmp_path, 1, suffix=".abandoned")
    assert list(finish_saves(tmp_path)) == []
    assert committed_steps(tmp_path) == [1]


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_byte_in_any_file_falls_back_to_the_checkpoint_before(
    tmp_path: Path, where: float
) -> None:
    save(tmp_path, 1, 2)
    for path in files_of(checkpoint_folder(tmp_path, 2)):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[int(where * len(damaged))] ^= 0x10
        path.write_bytes(damaged)
        notices: list[str] = []
        try:
            reader = newest(tmp_path, notices)
        finally:
            path.write_bytes(original)
        assert reader is not None
        assert reader.step == 1
        assert any("step 2" in text and str(path.parent) in text for text in notices)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    folder = checkpoint_folder(tmp_path, 2)
    victim = folder / ("manifest.json" if damage == "no manifest" else "rank-00000.safetensors")
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        victim.unlink()
    notices: list[str] = []
    reader = newest(tmp_path, notices)
    assert reader is not None
    assert reader.step == 1
    assert len(notices) == 1
    assert str(victim) in notices[0]


def test_if_every_checkpoint_is_damaged_the_run_does_not_start_afresh(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint_folder(tmp_path, 1) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        newest(tmp_path)


def test_one_of_another_version_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    folder = checkpoint_folder(tmp_path, 2)

    class LaterManifest(CheckpointManifest):
        field_of_later: int = 1

    later = LaterManifest(**dict(read_manifest(folder)))
    (folder / MANIFEST).write_text(manifest_text(later))
    with pytest.raises(OtherVersionError, match=r"step-00000002.*field_of_later.*move step-0"):
        newest(tmp_path)
    folder.rename(tmp_path / "away")
    assert newest(tmp_path).step == 1


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        open_checkpoint(tmp_path, notice=print)


def test_one_checkpoint_folder_can_be_opened_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert open_checkpoint(tmp_path, notice=print).step == 2
    assert open_checkpoint(checkpoint_folder(tmp_path, 1), notice=print).step == 1
    victim = checkpoint_folder(tmp_path, 1) / "rank-00000.safetensors"
    os.truncate(victim, 10)
    with pytest.raises(CheckpointError, match=r"rank-00000.*10 bytes"):
        open_checkpoint(checkpoint_folder(tmp_path, 1), notice=print)


def test_another_models_checkpoint_is_refused_by_the_field(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reader = open_checkpoint(tmp_path, notice=print)
    require_same_model(reader, run_config().model)
    with pytest.raises(CheckpointError, match=r"model\.expand = 2.*3"):
        require_same_model(reader, run_config(expand=3).model)
    with pytest.raises(CheckpointError, match="another model"):
        reader.read("a", "master", start=0, numel=16)
    with pytest.raises(CheckpointError, match="no parameter zz"):
        reader.read("zz", "master", start=0, numel=1)


def test_a_full_disk_raises_and_leaves_the_checkpoints_before_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def no_room(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rank_file, "write_tensors", no_room)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert not staging_folder(tmp_path, 2).exists()
    assert open_checkpoint(tmp_path, notice=print).step == 1
    save(tmp_path, 2)
    assert open_checkpoint(tmp_path, notice=print).step == 2


def test_all_ranks_look_at_what_the_first_one_finds(tmp_path: Path) -> None:
    """A network file system shows the others an old list; they would go on from another step."""

    class Other(RankOf):
        def from_first(self, values: Sequence[int]) -> list[int]:
            assert list(values) == [1, 2]
            return [1]

    save(tmp_path, 1, 2)
    reader = find_checkpoint(tmp_path, ranks=Other(rank=1, size=2), notice=pytest.fail)
    assert reader is not None
    assert reader.step == 1


@pytest.mark.parametrize("error", [RuntimeError("a driver is gone"), OSError("gone")])
def test_a_failure_on_one_rank_fails_the_save_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Second(RankOf):
        def __init__(self) -> None:
            super().__init__(rank=1, size=2)
            self.votes: list[bool] = []

        def any_rank(self, flag: bool) -> bool:
            self.votes.append(flag)
            return flag

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(rank_file, "write_tensors", fail)
    staging_folder(tmp_path, 1).mkdir(parents=True)
    ranks = Second()
    with pytest.raises(CheckpointError, match="not written"):
        save_checkpoint(tmp_path, snapshot(1), ranks=ranks)
    assert ranks.votes == [False, True]


def test_damaged_checkpoints_are_set_aside_and_their_step_can_be_saved_again(
    tmp_path: Path,
) -> None:
    save(tmp_path, 1, 2)
    os.truncate(checkpoint_folder(tmp_path, 2) / "rank-00000.safetensors", 10)
    reader = newest(tmp_path)
    assert reader is not None
    assert set_aside_newer(tmp_path, reader.step) == ["step-00000002.damaged"]
    assert committed_steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert Retention(tmp_path, CheckpointConfig(keep_last=1)).apply(notice=pytest.fail) == [1]
    assert open_checkpoint(tmp_path, notice=print).step == 2


def record(start: int, numel: int) -> FragmentRecord:
    return FragmentRecord(
        name="p",
        file="f",
        start=start,
        numel=numel,
        master_sha256="",
        exp_avg_sha256="",
        exp_avg_sq_sha256="",
    )


@pytest.mark.parametrize(
    ("ranges", "fault"),
    [
        ([(0, 4)], "4 elements stored, 6 expected"),
        ([(0, 2), (3, 3)], "elements 2 to 3 are missing"),
        ([(0, 4), (3, 3)], "elements 3 to 4 are stored twice"),
    ],
)
def test_gaps_and_overlaps_are_refused(ranges: list[tuple[int, int]], fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        require_exact_cover("p", 6, [record(*r) for r in ranges])
    require_exact_cover("p", 6, [record(4, 2), record(0, 4)])


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    wanted=st.tuples(st.integers(0, 44), st.integers(1, 45)),
)
def test_pieces_make_up_exactly_the_wanted_range(cuts: list[int], wanted: tuple[int, int]) -> None:
    records, position = [], 0
    for cut in cuts:
        records.append(record(position, cut))
        position += cut
    start = wanted[0] % position
    numel = min(wanted[1], position - start)
    elements = [
        piece.fragment.start + i
        for piece in pieces_of_range(records, start=start, numel=numel)
        for i in range(piece.begin, piece.end)
    ]
    assert elements == list(range(start, start + numel))
