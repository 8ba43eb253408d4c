"""One rank of `bench checkpoint`: trains a model on random tokens, and saves it in two ways.

Runs as `python -m mamba_dist.commands.bench.checkpoint_worker JSON` under a launcher's environment
variables; rank 0 prints a line of JSON for each round.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from mamba_dist.checkpoint.host_copy import state_bytes
from mamba_dist.checkpoint.layout import checkpoint_folder
from mamba_dist.checkpoint.manifest import Progress, TokenizerRecord
from mamba_dist.checkpoint.reader import find_checkpoint
from mamba_dist.checkpoint.store import Snapshot, save_checkpoint
from mamba_dist.commands.bench.checkpoint_report import STEPS, Turn
from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.schema import CheckpointConfig, MambaConfig, RunConfig
from mamba_dist.engine import zero
from mamba_dist.engine.base import OptimizerSettings, ParameterGroup
from mamba_dist.engine.memory import stage_for
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.engine.zero_settings import zero_settings
from mamba_dist.errors import CheckpointError
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.train.saver import Saver

_WARM_UP_STEPS: Final = 3
_DD_BLOCK_BYTES: Final = 8 << 20


class _Rank:
    """The training of one rank."""

    def __init__(self, asked: dict[str, Any], world: World) -> None:
        self.world = world
        self.folder = Path(asked["folder"])
        self._model = MambaConfig.model_validate(asked["model"])
        self._engine = _engine(self._model, EngineConfig(zero_stage=asked["stage"]), world)
        generator = torch.Generator().manual_seed(world.rank)
        shape = (2, asked["batch"], asked["length"])
        tokens = torch.randint(0, self._model.vocab_size, shape, generator=generator)
        tokens = tokens.to(world.device)
        self._inputs = {"input_ids": tokens[0], "labels": tokens[1]}
        self._tokens = world.size * tokens[0].numel()
        self._step = 0
        self._held_s = 0.0
        self.saver = Saver(
            self.folder,
            CheckpointConfig(save_mode="async", keep_last=1),
            fragments=self._engine.fragments,
            ranks=world,
            ranks_on_host=world.size,
        )

    def train(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            loss = self._engine.forward_backward(self._inputs, step_tokens=self._tokens, last=True)
            held = time.perf_counter()
            self.saver.hold_update()
            self._held_s += time.perf_counter() - held
            self._engine.step(1e-4, max_grad_norm=1.0, skip_above=None)
            _, votes = self.world.sum_over_ranks([float(loss), self.saver.vote])
            self.saver.hear(votes)
            self._step += 1
            taken.append(time.perf_counter() - began)
        return taken

    def turn(self) -> Turn:
        """One round of everything."""
        quiet = self.train(STEPS)
        began, self._held_s = time.perf_counter(), 0.0
        self.saver.save(self._snapshot(), must_succeed=False)
        begun_s = time.perf_counter() - began
        steps = []
        while self.saver.busy:
            steps += self.train(1)
        background_s = begun_s + sum(steps)
        beside_steps = len(steps)
        steps += self.train(STEPS - len(steps))
        after_s = begun_s + sum(steps[:STEPS])
        waited_s = begun_s + self._held_s
        quiet += self.train(STEPS)
        steps_s = sum(quiet) / 2
        beside_s = background_s - beside_steps * statistics.median(quiet)
        blocking_s = self._timed(self._save)
        dd_s = self._timed(self._dd)
        file_bytes = self._forget_pages()
        read_before = _bytes_read()
        load_s = self._timed(self._load)
        read, own = self.world.sum_over_ranks(
            [_bytes_read() - read_before, state_bytes(self._engine.fragments())]
        )
        return Turn(
            steps_s=steps_s,
            stall_s=after_s - steps_s,
            stall_beside_s=beside_s,
            waited_s=waited_s,
            background_s=background_s,
            blocking_s=blocking_s,
            dd_s=dd_s,
            load_s=load_s,
            state_bytes=int(own),
            file_bytes=file_bytes,
            read_bytes=int(read),
        )

    def _timed(self, work: Callable[[], None]) -> float:
        self.world.barrier()
        began = time.perf_counter()
        work()
        self.world.barrier()
        return time.perf_counter() - began

    def _save(self) -> None:
        # Of another step than the save in the background, whose folder has that name.
        self._step += 1
        save_checkpoint(self.folder, self._snapshot(), ranks=self.world)

    def _dd(self) -> None:
        if self.world.rank == 0:
            size = sum(f.stat().st_size for f in self._newest().iterdir())
            target = self.folder / "dd"
            words = [f"of={target}", f"bs={_DD_BLOCK_BYTES}", "conv=fsync", "if=/dev/zero"]
            count = f"count={math.ceil(size / _DD_BLOCK_BYTES)}"
            subprocess.run(["dd", *words, count], check=True, capture_output=True)
            target.unlink()

    def _forget_pages(self) -> int:
        """Has the disk read what is loaded next; size of the checkpoint."""
        size = 0
        for path in self._newest().iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size += path.stat().st_size
        return size

    def _load(self) -> None:
        reader = find_checkpoint(self.folder, ranks=self.world, notice=print, contents=False)
        if reader is None:
            raise CheckpointError(f"{self.folder}: nothing was saved")
        self._engine.load_fragments(reader, adam_steps=reader.manifest.adam_steps)

    def _newest(self) -> Path:
        return checkpoint_folder(self.folder, self._step)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            progress=Progress(
                step=self._step,
                next_sample=0,
                trained_tokens=0,
                global_batch_size=1,
                data_fingerprint="",
            ),
            adam_steps=self._engine.adam_steps,
            fragments=self._engine.fragments(),
            config=RunConfig.model_validate(
                {
                    "model": self._model.model_dump(),
                    "training": {"max_steps": 1, "warmup_steps": 0, "global_batch_size": 32},
                }
            ),
            tokenizer=TokenizerRecord(sha256="", eos_token=""),
            engine="bench",
            versions={},
        )


def main(asked: dict[str, Any]) -> None:
    """Prints the rounds."""
    world = start_world(timeout_minutes=10)
    torch.set_num_threads(asked["threads"])
    rank = _Rank(asked, world)
    rank.train(_WARM_UP_STEPS)
    for _ in range(asked["rounds"]):
        turn = rank.turn()
        if world.rank == 0:
            print(json.dumps(asdict(turn)), flush=True)
    stop_world()


def _engine(model: MambaConfig, config: EngineConfig, world: World) -> zero.ZeroEngine:
    stage = stage_for(config, ranks=world.size)
    settings = zero_settings(config, stage=stage, precision="fp32", accumulation_steps=1)
    with zero.construction(settings):
        lm = MambaLM(model, backend=resolve_backend("auto", device_type=world.device.type))
    initialize(lm, model, seed=0, gather=zero.gather)
    names = tuple(name for name, _ in lm.named_parameters())
    return zero.ZeroEngine(
        lm.to(world.device),
        groups=[ParameterGroup(names, 0.0)],
        optimizer=OptimizerSettings(beta1=0.9, beta2=0.95, eps=1e-8),
        settings=settings,
        world=world,
    )


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    # As launch/train.py does, and for the same reason.
    os._exit(0)
