"""Saves and loads real engines through real checkpoints. Prints one JSON line per case from rank 0.

`state_worker.py write FOLDER`: with each engine, four steps at once against two, save, new engine,
load, two; then every engine's checkpoint into every other. Leaves the checkpoints in FOLDER/KIND.
`state_worker.py read FOLDER`: loads those on another number of ranks, each into an engine of the
next kind, saves again, and loads that into FSDP2.
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

KINDS = (0, 1, 2, 3, "fsdp2")


class Damaged:
    """A checkpoint of which nothing can be read."""

    def read(self, name: str, kind: str, *, start: int, numel: int) -> torch.Tensor:
        return torch.zeros(numel)


def new_engine(kind: int | str, world: World, **choices: bool):
    # Its one head leaves a rank without a part of some parameters.
    return tiny.build_engine(kind, layer="mamba2", precision="fp32", world=world, **choices)


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
            same = same and torch.equal(fragment.tensor(kind).cpu(), stored)
    stored_weights = reader.read_parameters()
    for name, weight in tiny.whole_weights(engine).items():
        same = same and torch.equal(weight.cpu(), stored_weights[name])
    return not world.any_rank(not same)


def write(folder: Path, world: World) -> list[dict]:
    results = []
    for kind in KINDS:
        whole = new_engine(kind, world)
        losses = train(whole, range(4), world)
        first = new_engine(kind, world)
        train(first, range(2), world)
        save(first, folder / str(kind), world)
        second = new_engine(kind, world)
        # What it has gathered of its first weights must not outlive the loading.
        second.evaluate(tiny.batch(0, 0, world.rank))
        load(second, folder / str(kind), world)
        again = new_engine(kind, world, **({} if kind == "fsdp2" else {"small_stay_whole": True}))
        # As at a start whose newest checkpoint turns out to be damaged while it is read.
        again.load_fragments(Damaged(), adam_steps=9)
        load(again, folder / str(kind), world)
        evaluated = [e.evaluate(tiny.batch(9, 0, world.rank)) for e in (first, second)]
        resumed = train(second, range(2, 4), world)
        wanted, got = tiny.whole_weights(whole), tiny.whole_weights(second)
        results.append(
            {
                "case": "resume",
                "kind": kind,
                "same_evaluation": torch.equal(*evaluated),
                "same_after_damage": train(again, range(2, 4), world) == losses[2:],
                "same_losses": resumed == losses[2:],
                "same_weights": all(torch.equal(got[n], wanted[n]) for n in wanted),
            }
        )
    for target in KINDS:
        engine = new_engine(target, world)
        for source in KINDS:
            reader = load(engine, folder / str(source), world)
            same = same_state(engine, reader, world)
            results.append({"case": "load", "source": source, "target": target, "same": same})
    return results


def read(folder: Path, world: World) -> list[dict]:
    results = []
    for source, target in zip(KINDS, KINDS[1:] + KINDS[:1], strict=True):
        engine = new_engine(target, world)
        reader = load(engine, folder / str(source), world)
        again = folder / f"{source}-again"
        save(engine, again, world)
        last = new_engine("fsdp2", world)
        load(last, again, world)
        same = same_state(engine, reader, world) and same_state(last, reader, world)
        results.append({"case": "other world", "source": source, "target": target, "same": same})
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
