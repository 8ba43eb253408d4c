"""Every ZeRO stage and FSDP2 on these ranks against one plain process on the same global batch.

Prints one JSON line per case from rank 0. By hand, on GPUs where there are any:
`torchrun --nproc_per_node 2 tests/engine/parity_worker.py mamba1 bf16`.
"""

import json
import os
import sys

import tiny_lm as tiny
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.distributed.tensor import DTensor

from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.model.init import initialize

STEPS = 5
BAD_STEP = 2


def plain_run(layer: str, precision: str, world: World, *, skip: bool):
    """Losses, norms, first gradients and final weights of one process, same micro-batches."""
    lm = tiny.build(layer)
    initialize(lm, tiny.tiny_config(layer), seed=3, gather=tiny.zero.gather)
    device = world.device
    module = tiny.Scaled(lm).to(device)
    named = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in g.names], "weight_decay": g.weight_decay}
            for g in tiny.parameter_groups(lm)
        ],
        lr=tiny.LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        total = 0.0
        for micro in range(tiny.MICRO_STEPS):
            for rank in range(world.size):
                batch = {n: t.to(device) for n, t in tiny.batch(step, micro, rank).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = module(**batch)
                (loss / tiny.step_tokens(step, world.size)).backward()
                total += loss.item()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in named.items()}
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), tiny.MAX_GRAD_NORM)))
        if not (skip and step == BAD_STEP):
            optimizer.step()
        optimizer.zero_grad()
    return losses, norms, gradients, {n: p.detach() for n, p in named.items()}


def whole_gradient(kind: int | str, parameter) -> Tensor:
    if kind == "fsdp2":
        return parameter.grad.full_tensor()
    return (parameter.grad if kind == 0 else safe_get_full_grad(parameter)).clone()


def first_gradients(engine, kind: int | str, world: World) -> dict[str, Tensor]:
    for micro in range(tiny.MICRO_STEPS):
        engine.forward_backward(
            tiny.batch(0, micro, world.rank),
            step_tokens=tiny.step_tokens(0, world.size),
            last=micro == tiny.MICRO_STEPS - 1,
        )
        shards = [p for p in engine.module.parameters() if isinstance(p, DTensor)]
        reduced = [p.grad is not None for p in shards]
        assert all(reduced) if micro == tiny.MICRO_STEPS - 1 else not any(reduced)
    return {n: whole_gradient(kind, p) for n, p in engine.module.named_parameters()}


def rounded_parameters(engine) -> set[str]:
    """Is filled by each forward with the names of parameters that it reads in less than fp32."""
    found: set[str] = set()
    names = {module: name for name, module in engine.module.named_modules()}

    def look(module, args) -> None:
        for part in module.modules():
            # Those come to look at themselves.
            if part is module or part not in engine.module.lm.projections:
                found.update(
                    f"{names[part]}.{parameter}"
                    for parameter, value in part.named_parameters(recurse=False)
                    if value.dtype != torch.float32
                )

    for module in (*engine.module.lm.backbone.layers, *engine.module.lm.projections):
        module.register_forward_pre_hook(look)
    return found


def relative_l2(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


def parity(
    kind: int | str,
    checkpointing: str,
    layer: str,
    precision: str,
    world: World,
    plain,
    **choices,
) -> dict:
    losses, norms, gradients, weights = plain
    make = {
        "layer": layer,
        "precision": precision,
        "checkpointing": checkpointing,
        "world": world,
        **choices,
    }
    found = first_gradients(tiny.build_engine(kind, **make), kind, world)
    engine = tiny.build_engine(kind, **make)
    rounded = rounded_parameters(engine)
    steps = [tiny.engine_step(engine, step, world=world) for step in range(STEPS)]
    final = tiny.whole_weights(engine)
    elements = sum(f.master.numel() for f in engine.fragments())
    return {
        "case": "parity",
        "kind": kind,
        "checkpointing": checkpointing,
        "choices": sorted(choices),
        "loss": max(abs(s[0] - w) / w for s, w in zip(steps, losses, strict=True)),
        # Of the first step: from the second on, bf16 weights may round to another neighbour.
        "norm": abs(steps[0][1].grad_norm - norms[0]) / norms[0],
        "gradient": max(relative_l2(found[n], g) for n, g in gradients.items()),
        "weight_over_lr": max(
            float((final[n] - w).abs().max()) / tiny.LEARNING_RATE for n, w in weights.items()
        ),
        "owned_elements": world.sum_over_ranks([elements])[0],
        "elements": sum(w.numel() for w in weights.values()),
        "dtypes": sorted({str(w.dtype) for w in final.values()}),
        "rounded": sorted(rounded),
    }


def state(engine) -> dict[str, Tensor]:
    """Whole weights and this rank's moments."""
    own = {f"{f.name}|{k}": f.tensor(k).clone() for f in engine.fragments() for k in STATE_KINDS}
    return tiny.whole_weights(engine) | own


# The last makes gradients whose squares overflow.
_BAD_SCALES = {"nan": float("nan"), "spike": 1e4, "infinite": 1e25}


def skipping(
    kind: int | str,
    case: str,
    layer: str,
    precision: str,
    world: World,
    plain,
    **choices,
) -> dict:
    """One bad micro-batch of the last rank: all ranks drop just that step."""
    engine = tiny.build_engine(kind, layer=layer, precision=precision, world=world, **choices)
    bad = {(0, world.size - 1): _BAD_SCALES[case]}
    skipped, untouched = [], None
    for step in range(STEPS):
        before = state(engine) if step == BAD_STEP else None
        _, stats = tiny.engine_step(
            engine,
            step,
            world=world,
            scales=bad if step == BAD_STEP else None,
            skip_above=None if case == "infinite" else 50.0,
        )
        skipped.append(stats.skipped)
        if before is not None:
            after = state(engine)
            untouched = all(torch.equal(before[n], after[n]) for n in before)
    final = tiny.whole_weights(engine)
    return {
        "case": case,
        "kind": kind,
        "choices": sorted(choices),
        "skipped": skipped,
        "votes": world.sum_over_ranks([float(s) for s in skipped]),
        "untouched": untouched,
        "adam_steps": engine.adam_steps,
        "weight_over_lr": max(
            float((final[n] - w).abs().max()) / tiny.LEARNING_RATE for n, w in plain[3].items()
        ),
    }


def main() -> None:
    layer, precision = sys.argv[1:3]
    world = start_world(timeout_minutes=3)
    plain = plain_run(layer, precision, world, skip=False)
    plain_skipping = plain_run(layer, precision, world, skip=True)
    for kind in (0, 1, 2, 3, "fsdp2"):
        # Only these take parameters away between a forward and its backward.
        checkpointing = ("none", "full", *(("selective",) if kind in (3, "fsdp2") else ()))
        case = (layer, precision, world)
        results = [parity(kind, c, *case, plain) for c in checkpointing]
        results += [
            skipping(kind, bad, *case, plain_skipping)
            for bad in _BAD_SCALES
            # Stage 3 adds the squares up in fp64, where they are finite.
            if (kind, bad) != (3, "infinite")
        ]
        # What stands in for a recorder of CUDA graphs stands on a CPU.
        if kind == 0 and world.device.type == "cpu":
            results.append(parity(0, "none", *case, plain, recorded=True))
            results.append(skipping(0, "nan", *case, plain_skipping, recorded=True))
        if kind == "fsdp2":
            results.append(parity(kind, "none", *case, plain, reshard_after_forward=False))
            results.append(parity(kind, "none", *case, plain, reduce_dtype="bf16"))
            if precision == "bf16":
                results += [
                    parity(kind, c, *case, plain, gather_dtype="bf16") for c in checkpointing
                ]
        if world.rank == 0:
            for result in results:
                print(json.dumps(result), flush=True)
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main()
