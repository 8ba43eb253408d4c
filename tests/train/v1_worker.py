"""Builds real runs from version 1 configs on one rank and takes one step of the real loop in each.

`v1_worker.py FOLDER NAME…`: for each FOLDER/NAME.json, in this order, prints one JSON line of what
was seen and leaves the weights before and after the step in FOLDER/NAME.pt.
"""

import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mamba_dist.config.load import load_config
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.telemetry.metrics import Metrics, Record, TrainRecord
from mamba_dist.train.build import Run, build_run, open_matching_sources, prepare
from mamba_dist.train.loop import train
from mamba_dist.train.meter import Meter
from mamba_dist.train.run_folder import HeldFolder, held_run_folder
from mamba_dist.train.stop import StopRequest


class Kept:
    """A sink that keeps the training records."""

    def __init__(self) -> None:
        self.records: list[TrainRecord] = []

    def write(self, record: Record) -> None:
        if isinstance(record, TrainRecord):
            self.records.append(record)

    def close(self) -> None:
        pass


def weights_of(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.engine.module.named_parameters()}


def padded_ids(run: Run) -> list[int]:
    """What stands where the validation batches hold no token of the data set."""
    [source] = open_matching_sources(run.config)
    tokens = source.dataset.val.tokens
    length = run.config.data.sequence_length
    found: set[int] = set()
    for batch in run.validation:
        for sample, row in zip(batch.sample_ids, batch.input_ids, strict=True):
            present = 0 if sample.number < 0 else min(length, tokens - sample.number * length)
            found |= set(row[present:].tolist())
    return sorted(found)


def one_step(run: Run, held: HeldFolder) -> dict[str, object]:
    """What the first optimizer step of the real loop shows of itself."""
    batches = next(run.steps)
    run.steps.restart(run.steps.order, 0)
    sink, kept = Kept(), []
    meter = Meter(
        Metrics([sink]),
        log_steps=1,
        world_size=1,
        step_positions=1,
        flops_per_token=1.0,
        advance_to=lambda step: None,
        loader_workers=0,
    )
    mixer = run.engine.module.get_submodule("backbone.layers.0.mixer")
    products: set[str] = set()

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        products.add(str(output.dtype))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    for name in ("in_proj", "x_proj", "out_proj"):
        mixer.get_submodule(name).register_forward_hook(note)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train(replace(run, meter=meter, total_steps=1), held)
    moments = [f.exp_avg.square().sum() for f in run.engine.fragments()]
    share = 1 - run.config.training.adam_beta1
    return {
        "microbatches": len(batches),
        "shapes": sorted({tuple(b.input_ids.shape) for b in batches}),
        "sample_ids": [sample.number for b in batches for sample in b.sample_ids],
        "product_dtypes": sorted(products),
        "saved_bytes": sum(kept),
        # After one step AdamW's first moment is the clipped gradient times 1 - beta1.
        "clipped_norm": math.sqrt(float(sum(moments))) / share,
        "record": asdict(sink.records[0]),
    }


def observe(folder: Path, name: str, world: World) -> Run:
    run_dir = folder / "worker-runs" / name
    config = load_config(folder / f"{name}.json", [f"training.run_dir={run_dir}"]).config
    with held_run_folder(config, world=world) as held:
        prepared = prepare(config, ranks=world.size)
        run = build_run(config, prepared, world=world, stop=StopRequest())
        before = weights_of(run)
        seen = {"name": name, "padded_ids": padded_ids(run), **one_step(run, held)}
        after = weights_of(run)
    seen["parameter_dtypes"] = sorted({str(w.dtype) for w in after.values()})
    torch.save({"before": before, "after": after}, folder / f"{name}.pt")
    print(json.dumps(seen), flush=True)
    return run


def main() -> None:
    folder = Path(sys.argv[1])
    world = start_world(timeout_minutes=1)
    # DeepSpeed remembers parameters by id(); those of a collected run could be given to the next.
    runs = [observe(folder, name, world) for name in sys.argv[2:]]
    assert len(runs) == len(sys.argv[2:])
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main()
