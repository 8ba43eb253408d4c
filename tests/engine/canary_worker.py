"""Looks at each private part of DeepSpeed that the engine relies on. Prints JSON lines.

Each case is a name and, if something is gone or changed, what was found. The reasons stand in
`mamba_dist/engine/zero.py` and `mamba_dist/engine/world.py`.
"""

import importlib
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import tiny_lm as tiny
import torch
from deepspeed.runtime.zero import stage3
from torch import Tensor

from mamba_dist.engine import zero
from mamba_dist.engine.world import World, start_world, stop_world
from mamba_dist.model.init import initialize

Check = Callable[[], None]


def shared_memory() -> set[str]:
    return {
        entry.name for entry in Path("/dev/shm").iterdir() if entry.stat().st_uid == os.getuid()
    }


def build(stage: int, world: World) -> zero.ZeroEngine:
    return tiny.build_engine(stage, layer="mamba1", precision="fp32", world=world)


def compatible_ops() -> None:
    ops = deepspeed.ops.__compatible_ops__
    assert "deepspeed_shm_comm" in ops, f"deepspeed.ops.__compatible_ops__ has only {sorted(ops)}"
    # `deepspeed.comm.torch` as an attribute is PyTorch itself.
    built = importlib.import_module("deepspeed.comm.torch").build_shm_op()
    assert built is None, (
        "DeepSpeed builds its shared-memory all-reduce although world.py has marked it as "
        "incompatible in __compatible_ops__"
    )


def engine_privates(engine: zero.ZeroEngine) -> None:
    applied = engine._engine.was_step_applied()
    assert applied is False, f"was_step_applied() before any step is {applied!r}"
    assert hasattr(engine._engine, "set_gradient_accumulation_boundary"), "it is gone"


def reduction_privates(engine: zero.ZeroEngine, world: World) -> None:
    """On one rank gradients are not reduced, and DeepSpeed would do it if it were not told."""
    reductions: list[object] = []
    engine._engine.allreduce_gradients = lambda *_, **__: reductions.append(None)
    tiny.engine_step(engine, 3, world=world)
    assert not reductions, "enable_backward_allreduce = False no longer keeps DeepSpeed from it"
    engine._engine.enable_backward_allreduce = True
    tiny.engine_step(engine, 4, world=world)
    assert reductions, "DeepSpeed reduces by another way than allreduce_gradients"


def shared_masters(engine: zero.ZeroEngine) -> None:
    optimizer = engine._optimizer
    parts = optimizer.parallel_partitioned_bit16_groups
    masters = optimizer.single_partition_of_fp32_groups
    assert len(parts) == len(masters)
    assert callable(getattr(optimizer, "_link_all_hp_params", None)), "it is gone"
    for name, parameter in engine.module.named_parameters():
        fragment = parameter._hp_mapping.get_hp_fragment()
        assert fragment.data_ptr() == parameter.data_ptr(), (
            f"{name}: AdamW updates a copy, see _share_masters in zero.py"
        )


def leaf_modules(engine: zero.ZeroEngine) -> None:
    layers = [m for m in engine.module.modules() if isinstance(m, torch.nn.ModuleList)]
    assert layers
    assert all(deepspeed.utils.z3_leaf_module(layer) for layer in layers[0])
    for layer in layers[0]:
        inner = [m for m in layer.modules() if m is not layer and hasattr(m, "ds_grads_remaining")]
        assert not inner, f"ZeRO-3 still hooks into {inner} inside a leaf module"


def flat_master_privates(engine: zero.ZeroEngine) -> None:
    optimizer = engine._optimizer
    masters = optimizer.single_partition_of_fp32_groups
    numel = sum(p.numel() for p in engine.module.parameters())
    assert all(isinstance(m, Tensor) and m.dtype == torch.float32 for m in masters)
    assert sum(m.numel() for m in masters) >= numel, "the masters do not hold every parameter"
    in_adamw = [p for group in engine._adamw.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(in_adamw, masters, strict=True)), (
        "AdamW no longer updates single_partition_of_fp32_groups itself"
    )
    for name in ("scaled_global_norm", "update_lp_params", "_lazy_init_hp_params_optimizer_state"):
        assert callable(getattr(optimizer, name, None)), f"{name} is gone"
    assert not inspect.signature(type(optimizer).scaled_global_norm).parameters.keys() - {
        "self",
        "norm_type",
    }, "scaled_global_norm takes other arguments"


def hp_mapping(engine: zero.ZeroEngine) -> None:
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        address = mapping.lp_fragment_address
        assert (address.start, address.numel) == (0, parameter.numel()), f"{name}: {address}"
        for key in (None, "exp_avg", "exp_avg_sq"):
            fragment = mapping.get_hp_fragment() if key is None else mapping.get_hp_fragment(key)
            assert fragment.shape == (parameter.numel(),), f"{name} {key}: {fragment.shape}"
            assert fragment.dtype == torch.float32, f"{name} {key}: {fragment.dtype}"
        assert torch.equal(mapping.get_hp_fragment(), parameter.detach().flatten()), name


def low_precision_follows_the_master(engine: zero.ZeroEngine) -> None:
    parameter = next(engine.module.parameters())
    with torch.no_grad():
        parameter._hp_mapping.get_hp_fragment().fill_(0.25)
    engine._optimizer.update_lp_params()
    assert bool((parameter == 0.25).all()), (
        "update_lp_params no longer copies the fp32 master into the parameter"
    )


def partition_privates(engine: zero.ZeroEngine) -> None:
    for name, parameter in engine.module.named_parameters():
        assert parameter.ds_numel == math.prod(parameter.ds_shape), name
        assert parameter.ds_tensor.data.numel() >= parameter.ds_numel, name
        for key in (None, "exp_avg", "exp_avg_sq"):
            local = engine._optimizer.get_local_fp32_param(parameter, key)
            assert local.dtype == torch.float32, f"{name} {key}: {local.dtype}"
            assert local.numel() >= parameter.ds_numel, f"{name} {key}: {local.numel()}"
    masters = engine._optimizer.fp32_partitioned_groups_flat
    numel = sum(p.ds_numel for p in engine.module.parameters())
    assert sum(m.numel() for m in masters) >= numel, "the masters do not hold every parameter"
    persistent = engine._optimizer.persistent_parameters
    assert isinstance(persistent, list), f"persistent_parameters is a {type(persistent)}"
    assert callable(next(engine.module.parameters()).all_gather)


def partition_norm_privates(engine: zero.ZeroEngine) -> None:
    assert callable(getattr(engine._optimizer, "_get_norm_groups", None)), "it is gone"
    combined = stage3.combine_grad_norm_groups([torch.tensor(3.0), torch.tensor(4.0)])
    assert float(combined) == 5.0, f"combine_grad_norm_groups of 3 and 4 is {float(combined)}"
    marked = stage3.combine_grad_norm_groups([torch.tensor(-1.0), torch.tensor(4.0)])
    assert not 0 <= float(marked) < math.inf, f"an invalid norm, marked by -1, became {marked}"


def plain_norm() -> float:
    """The gradient norm of step 0 in plain PyTorch."""
    lm = tiny.build("mamba1")
    initialize(lm, tiny.tiny_config("mamba1"), seed=3, gather=zero.gather)
    module = tiny.Scaled(lm)
    for micro in range(tiny.MICRO_STEPS):
        (module(**tiny.batch(0, micro, 0)) / tiny.step_tokens(0, 1)).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))


def veto(engine: zero.ZeroEngine, world: World) -> None:
    """A good step is applied, and a spike and a NaN are dropped with their own norm reported."""
    _, good = tiny.engine_step(engine, 0, world=world)
    assert not good.skipped
    assert math.isclose(good.grad_norm, plain_norm(), rel_tol=1e-4), (
        f"the gradient norm is {good.grad_norm}, without DeepSpeed {plain_norm()}: "
        "backward(scale_wrt_gas=False) or the accumulation boundary means something else"
    )
    before = tiny.whole_weights(engine)
    for factor, expected in (
        (1e4, math.isfinite),
        (math.nan, lambda norm: not math.isfinite(norm)),
    ):
        _, bad = tiny.engine_step(engine, 1, world=world, scales={(0, 0): factor}, skip_above=50.0)
        assert bad.skipped, f"a loss times {factor} was not dropped: {bad}"
        assert expected(bad.grad_norm), f"a loss times {factor} reports {bad}"
        assert bad.grad_norm != good.grad_norm, f"a loss times {factor} reports the step before's"
    after = tiny.whole_weights(engine)
    assert all(torch.equal(before[n], after[n]) for n in before), "a dropped step changed weights"
    assert engine.adam_steps == 1, f"AdamW counts {engine.adam_steps} steps"
    _, again = tiny.engine_step(engine, 2, world=world)
    assert not again.skipped


def checks(engine: zero.ZeroEngine, stage: int, world: World) -> Iterator[tuple[str, Check]]:
    yield "DeepSpeedEngine", lambda: engine_privates(engine)
    if stage in (1, 2):
        yield "shared masters", lambda: shared_masters(engine)
        yield "flat masters", lambda: flat_master_privates(engine)
        yield "_hp_mapping", lambda: hp_mapping(engine)
    if stage == 3:
        yield "leaf modules", lambda: leaf_modules(engine)
        yield "ds_tensor, ds_numel, ds_shape", lambda: partition_privates(engine)
        yield "_get_norm_groups", lambda: partition_norm_privates(engine)
    yield "veto", lambda: veto(engine, world)
    if stage == 0:
        yield "reduction", lambda: reduction_privates(engine, world)
    if stage in (1, 2):
        yield "update_lp_params", lambda: low_precision_follows_the_master(engine)


def report(name: str, check: Check) -> None:
    found = None
    try:
        check()
    # Whatever a changed DeepSpeed raises is the finding.
    except Exception:
        found = traceback.format_exc(limit=-2)
    print(json.dumps({"check": name, "found": found}), flush=True)


def report_stage(stage: int, world: World) -> None:
    built: list[zero.ZeroEngine] = []
    report(f"stage {stage}: ZeroEngine", lambda: built.append(build(stage, world)))
    # Without an engine there is nothing more to look at.
    for engine in built:
        for name, check in checks(engine, stage, world):
            report(f"stage {stage}: {name}", check)


def main() -> None:
    before = shared_memory()
    world = start_world(timeout_minutes=1)
    report("deepspeed.ops.__compatible_ops__", compatible_ops)
    for stage in (0, 1, 2, 3):
        report_stage(stage, world)
    print(json.dumps({"check": "/dev/shm", "found": sorted(shared_memory() - before)}))
    stop_world()
    sys.stdout.flush()
    os._exit(0)  # as launch/train.py does, and for the same reason


if __name__ == "__main__":
    main()
