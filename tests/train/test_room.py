"""Room for checkpoints and for shared memory, judged before a run takes it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from written_checkpoint import write_as_ranks

from mamba_dist.config.schema import RunConfig
from mamba_dist.model.flops import parameter_count
from mamba_dist.train import room
from mamba_dist.train.room import disk_objections, shared_memory_warning

BLOCK = 4096


def config(run_dir: Path, **changes: int) -> RunConfig:
    training = {"global_batch_size": 32, "max_steps": 100, "warmup_steps": 1}
    return RunConfig.model_validate(
        {
            "model": {"d_model": 64, "n_layers": 2, "vocab_size": 320},
            "training": {"run_dir": str(run_dir), **training},
            "checkpoint": {"save_steps": 10, "keep_last": 3, **changes},
        }
    )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(f_bavail=0, f_frsize=BLOCK, f_files=1000, f_favail=1000)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    return found


def test_a_disk_without_room_for_a_checkpoint_is_a_problem(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    one = 12 * parameter_count(config(tmp_path).model)
    disk.f_bavail = one // BLOCK
    problems, warnings = disk_objections(config(tmp_path), ranks=2)
    assert f"{tmp_path} has " in problems[0]
    assert "a checkpoint takes" in problems[0]
    assert warnings == []
    disk.f_bavail += 1
    assert disk_objections(config(tmp_path), ranks=2)[0] == []


@pytest.mark.parametrize(
    ("changes", "rooms"),
    [({}, 4), ({"keep_last": 1}, 2), ({"save_steps": 50}, 2), ({"save_steps": 1000}, 1)],
)
def test_room_for_all_that_is_kept_and_one_more_needs_no_warning(
    tmp_path: Path, disk: SimpleNamespace, changes: dict[str, int], rooms: int
) -> None:
    chosen = config(tmp_path, **changes)
    one = 12 * parameter_count(chosen.model)
    disk.f_bavail = rooms * one // BLOCK + 1
    assert disk_objections(chosen, ranks=2) == ([], [])
    if rooms > 1:
        disk.f_bavail = rooms * one // BLOCK - 1
        assert "checkpoint.keep_last" in disk_objections(chosen, ranks=2)[1][0]
        # What is there already will make room.
        folder = tmp_path / "checkpoints/step-00000005"
        folder.mkdir(parents=True)
        (folder / "rank-00000.safetensors").write_bytes(bytes(2 * BLOCK))
        assert disk_objections(chosen, ranks=2) == ([], [])


def test_what_is_deleted_before_the_next_save_is_room(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    """As after the kill of a run whose disk is as large as it must be."""
    chosen = config(tmp_path, keep_last=1)
    older, newer = (write_as_ranks(tmp_path, step, 1) for step in (10, 20))
    freed = sum(path.stat().st_size for path in older.iterdir())
    one = 12 * parameter_count(chosen.model)
    disk.f_frsize = 1
    disk.f_bavail = one - freed
    assert disk_objections(chosen, ranks=1)[0] == []
    disk.f_bavail -= 1
    assert "a checkpoint takes" in disk_objections(chosen, ranks=1)[0][0]
    assert older.exists()
    assert newer.exists()


def test_a_file_system_that_takes_no_more_files_is_a_problem(
    tmp_path: Path, disk: SimpleNamespace
) -> None:
    disk.f_bavail = 1 << 30
    disk.f_favail = 9
    assert "9 more files" in disk_objections(config(tmp_path), ranks=8)[0][0]
    disk.f_files = disk.f_favail = 0  # it does not count them
    assert disk_objections(config(tmp_path), ranks=8) == ([], [])


def test_too_little_shared_memory_for_nccl_names_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: SimpleNamespace
) -> None:
    monkeypatch.setattr(room, "_SHARED_MEMORY", tmp_path)
    world = SimpleNamespace(device=torch.device("cuda"), local_size=8)
    disk.f_bavail = (64 << 20) // BLOCK
    [plain] = shared_memory_warning(world)
    assert "64.0 MiB free, and NCCL may need 256.0 MiB for 8 ranks" in plain
    assert "deepspeed" not in plain
    left = tmp_path / "deepspeed_allreduce_buffer_5000_0_root"
    left.write_bytes(bytes(1 << 20))
    [clue] = shared_memory_warning(world)
    assert "1.0 MiB of it are deepspeed_allreduce_buffer*" in clue
    assert left.exists(), "whoever it belongs to may still use it"
    disk.f_bavail *= 4
    assert shared_memory_warning(world) == []
    world.device = torch.device("cpu")
    disk.f_bavail = 0
    assert shared_memory_warning(world) == []
