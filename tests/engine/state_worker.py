"""Saves and loads real engines through real checkpoints. Prints one JSON line per case from rank 0.

`state_worker.py write FOLDER`: at each stage, four steps at once against two, save, new engine,
load, two; then every stage's checkpoint into every other stage. Leaves the checkpoints in
FOLDER/stage-N. `state_worker.py read FOLDER`: loads those on another number of ranks.
"""

import json
import os
import sys
from pathlib import Path

import tiny_lm as tiny
import torch

from mamba_dist.checkpoint.manifest import Progress, TokenizerRecord
from mamba_dist.checkpoint.reader import find_checkpoint
from mamba_dist.checkpoint.store import Snapshot, save_checkpoint
from mamba_dist.config.schema import RunConfig, TrainingConfig
from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.engine.world import World, start_world, stop_world

STAGES = (0, 1, 2, 3)


def new_engine(stage: int, world: World):
    return tiny.build_engine(stage, layer="mamba1", precision="fp32", world=world)


def train(engine, steps: range, world: World) -> list[float]:
    return [tiny.engine_step(engine, step, world=world)[0] for step in steps]


def save(engine, folder: Path, world: World) -> None:
    snapshot = Snapshot(
        progress=Progress(
            step=2, next_sample=8, trained_tokens=1, global_batch_size=4, data_fingerprint="d"
        ),
        adam_steps=engine.adam_steps,
        fragments=engine.fragments(),
        config=RunConfig(
            training=TrainingConfig(max_steps=4, warmup_steps=1, global_batch_size=32)
        ),
        tokenizer=TokenizerRecord(sha256="0", eos_token="e"),
        engine="zero",
        versions={},
    )
    save_checkpoint(folder, snapshot, ranks=world)


def load(engine, folder: Path, world: World):
    reader = find_checkpoint(folder, ranks=world, notice=print)
    assert reader is not None
    engine.load_fragments(reader, adam_steps=reader.manifest.adam_steps)
    return reader


def same_state(engine, reader, world: World) -> bool:
    """Whether what the engine owns and computes with equals the checkpoint, bit for bit."""
    same = engine.adam_steps == reader.manifest.adam_steps
    for fragment in engine.fragments():
        for kind in STATE_KINDS:
            stored = reader.read(
                fragment.name, kind, start=fragment.start, numel=fragment.master.numel()
            )
            same = same and torch.equal(fragment.tensor(kind), stored)
    stored_weights = reader.read_parameters()
    for name, weight in tiny.whole_weights(engine).items():
        same = same and torch.equal(weight, stored_weights[name])
    return not world.any_rank(not same)


def write(folder: Path, world: World) -> list[dict]:
    results = []
    for stage in STAGES:
        whole = new_engine(stage, world)
        losses = train(whole, range(4), world)
        first = new_engine(stage, world)
        train(first, range(2), world)
        save(first, folder / f"stage-{stage}", world)
        second = new_engine(stage, world)
        load(second, folder / f"stage-{stage}", world)
        resumed = train(second, range(2, 4), world)
        wanted, got = tiny.whole_weights(whole), tiny.whole_weights(second)
        results.append(
            {
                "case": "resume",
                "stage": stage,
                "same_losses": resumed == losses[2:],
                "same_weights": all(torch.equal(got[n], wanted[n]) for n in wanted),
            }
        )
    for target in STAGES:
        engine = new_engine(target, world)
        for source in STAGES:
            reader = load(engine, folder / f"stage-{source}", world)
            same = same_state(engine, reader, world)
            results.append({"case": "load", "source": source, "target": target, "same": same})
    return results


def read(folder: Path, world: World) -> list[dict]:
    results = []
    for stage in STAGES:
        engine = new_engine(stage, world)
        reader = load(engine, folder / f"stage-{stage}", world)
        same = same_state(engine, reader, world)
        results.append({"case": "other world", "stage": stage, "same": same})
    return results


def main() -> None:
    action, folder = sys.argv[1], Path(sys.argv[2])
    world = start_world(timeout_minutes=3)
    results = {"write": write, "read": read}[action](folder, world)
    if world.rank == 0:
        for result in results:
            print(json.dumps(result), flush=True)
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main()
