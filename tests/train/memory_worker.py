"""What engines really allocate, by phases, counted by the preloaded allocator of this folder.

`memory_worker.py CASES`: a JSON list of [engine section, model section, training section, length];
prints one JSON line for each from rank 0.
"""

import ctypes
import json
import os
import sys
from typing import Any

import torch
from memory_cases import run_config

from mamba_dist.config.batch import batch_plan
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.train.engines import build_engine

COUNTER = ctypes.CDLL(None)
COUNTER.counted_bytes.restype = COUNTER.counted_peak.restype = ctypes.c_long
# DeepSpeed remembers parameters by id(); those of a collected engine could be given to the next
# one's.
_KEPT: list[Any] = []


def measured(config: RunConfig, world: World) -> dict[str, int]:
    """Bytes beyond those before: held at rest, when the second step's last forward pass is over,
    and the most in that step's passes and update."""
    plan, length = batch_plan(config, world.size), config.data.sequence_length
    rows, steps = plan.micro_batch_size, plan.accumulation_steps
    before = COUNTER.counted_bytes()
    engine, _ = build_engine(config, plan=plan, world=world)
    found: dict[str, int] = {"caches": 0}

    def look(*_: object) -> None:
        found["forward"] = COUNTER.counted_bytes() - before
        found["caches"] += torch.is_autocast_cache_enabled()

    engine.module.register_forward_hook(look)
    for step in range(2):
        if step == 1:
            found["at_rest"] = COUNTER.counted_bytes() - before
            COUNTER.counted_peak()
        for micro in range(steps):
            tokens = torch.randint(0, config.model.vocab_size, (rows, length + 1))
            inputs = {
                "input_ids": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "seq_idx": torch.zeros(rows, length, dtype=torch.int32),
            }
            engine.forward_backward(
                inputs,
                step_tokens=rows * length * steps * world.size,
                last=micro == steps - 1,
            )
        found["passes"] = COUNTER.counted_peak() - before
        engine.step(1e-3, max_grad_norm=1.0, skip_above=None)
        found["update"] = COUNTER.counted_peak() - before
    forward = found["forward"]
    engine.evaluate(inputs)
    found["forward"] = forward
    _KEPT.append(engine)
    return found


def main() -> None:
    world = start_world(timeout_minutes=3)
    cases = json.loads(sys.argv[1])
    for case in cases:
        # What is imported and set up at the first use is nobody's state.
        engine, model, training, length = case
        measured(run_config(engine, {**model, "n_layers": 1}, training, length), world)
        found = measured(run_config(*case), world)
        if world.rank == 0:
            print(json.dumps(found), flush=True)
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main()
