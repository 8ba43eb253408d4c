"""Room that a run will need: on the disk of its folder, in memory, in /dev/shm."""

import logging
import math
import os
from pathlib import Path
from typing import Final

import torch

from mamba_dist.checkpoint.free_memory import available_bytes, capacity_bytes
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.retention import Retention
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.world import World, spare_memory
from mamba_dist.model.flops import parameter_count
from mamba_dist.train.memory import (
    GIB,
    KEPT_OVER_ALLOCATED,
    SAVED_BYTES,
    memory_plan,
    memory_problem,
)
from mamba_dist.train.run_folder import run_folder

_log = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
# What NCCL takes for the ranks of one host, and the 64 MiB of Docker are too little for.
_NCCL_BYTES: Final = 32 << 20
_ABANDONED = "deepspeed_allreduce_buffer*"


def disk_objections(config: RunConfig, *, ranks: int) -> tuple[list[str], list[str]]:
    """Problems and warnings: room for the next checkpoint, and for all that are to be kept.

    What is free is asked of the file system, which knows of a user's quota on few of them.
    """
    run_dir = run_folder(config)
    disk = os.statvfs(run_dir)
    free = disk.f_bavail * disk.f_frsize
    one = SAVED_BYTES * parameter_count(config.model)
    # The file system may not count them (0 of 0), and a checkpoint has its manifest and folder too.
    if disk.f_files and disk.f_favail < ranks + 2:
        return [
            f"{run_dir} has room for {disk.f_favail:,} more files, and a checkpoint of {ranks:,} "
            "ranks is as many; delete files, or set training.run_dir=…"
        ], []
    doomed = Retention(run_dir, config.checkpoint).doomed(notice=_say_later)
    # They go before the next save.
    free += sum(_size(checkpoint_folder(run_dir, step)) for step in doomed)
    if free < one:
        return [
            f"{run_dir} has {_gib(free)} free, and a checkpoint takes {_gib(one)}; make room, or "
            "set training.run_dir=…"
        ], []
    kept = config.checkpoint.keep_last
    if config.training.max_steps is not None:
        saves = math.ceil(config.training.max_steps / config.checkpoint.save_steps)
        kept = min(kept, saves - 1)
    staying = set(committed_steps(run_dir)) - set(doomed)
    there = sum(_size(checkpoint_folder(run_dir, step)) for step in staying)
    if free + there < (kept + 1) * one:
        return [], [
            f"{run_dir} has {_gib(free)} free; the {kept} checkpoints that are kept "
            f"(checkpoint.keep_last) and the next one beside them take {_gib((kept + 1) * one)}: "
            "saves will fail when it is full"
        ]
    return [], []


def memory_objections(
    config: RunConfig, *, world: World, ranks_on_host: int
) -> tuple[list[str], list[str]]:
    """Problems and shortages: what the run certainly takes is more than the host or this rank's GPU
    has, or than others leave of it now.

    One rank of a host speaks for it. Where memory is only short, ranks on CPUs begin to spare it.
    All ranks must have looked before any of them takes some.

    Raises:
        ConfigError: the global batch cannot be cut evenly.
    """
    on_gpu = world.device.type == "cuda"
    sharing = 1 if on_gpu else ranks_on_host
    available, capacity = (
        torch.cuda.mem_get_info(world.device) if on_gpu else (available_bytes(), capacity_bytes())
    )
    plan = memory_plan(config, ranks=world.size, on_gpu=on_gpu)
    problem = memory_problem(
        config, ranks=world.size, ranks_on_host=sharing, on_gpu=on_gpu, available=available
    )
    if problem is not None:
        told = [problem] if on_gpu or world.local_rank == 0 else []
        return (told, []) if plan.certain * sharing > capacity else ([], told)
    needed = sharing * plan.peak
    if not on_gpu and needed * KEPT_OVER_ALLOCATED > available:
        _log.info(
            "%.1f GiB are free for some %.1f: what is freed goes back to the system at once, which "
            "takes some time",
            available / GIB,
            needed / GIB,
        )
        spare_memory()
    return [], []


def shared_memory_warning(world: World) -> list[str]:
    """Says that /dev/shm is too small for NCCL, and what of a DeepSpeed that ended may lie there.

    Nothing there is deleted: no name says whether a process still uses it. Our own ranks leave
    nothing there, see engine/world.py.
    """
    if world.device.type != "cuda" or world.local_size < 2 or not _SHARED_MEMORY.is_dir():
        return []
    disk = os.statvfs(_SHARED_MEMORY)
    free, needed = disk.f_bavail * disk.f_frsize, _NCCL_BYTES * world.local_size
    if free >= needed:
        return []
    left = sum(path.stat().st_size for path in _SHARED_MEMORY.glob(_ABANDONED))
    clue = (
        f"; {_gib(left)} of it are {_ABANDONED}, which DeepSpeed leaves behind: delete them if no "
        "other program of yours runs there"
    )
    return [
        f"{_SHARED_MEMORY} has {_gib(free)} free, and NCCL may need {_gib(needed)} for "
        f"{world.local_size} ranks (in a container: --shm-size){clue * bool(left)}"
    ]


def _say_later(fault: str) -> None:
    """Whoever goes on from a checkpoint, or deletes others, says what is wrong with it."""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 1 << 29 else f"{size / (1 << 20):.1f} MiB"
