"""A process of bench gpu-train for our own variants; `python -m` runs it, see `step.serve`.

`plain` is our model in a plain PyTorch loop. `zero-N` is our model in our engine at ZeRO stage N,
built and stepped as launch/train.py does it, on a world of one rank. Stages above 0 are as each of
several ranks runs them, without the communication: a training run on one rank takes stage 0
whatever its config says (`zero_settings.stage_for`). `fsdp2` is our model in our other engine, as a
training run on one rank has it: it copies each layer's parameters as if it gathered them.
"""

import torch
from torch import Tensor

from mamba_dist.commands.bench.gpu.step import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    SEED,
    Batch,
    Step,
    StepSpec,
    plain_step,
    serve,
    this_device,
)
from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine import zero
from mamba_dist.engine.base import Engine
from mamba_dist.engine.world import World, start_world
from mamba_dist.engine.zero_settings import zero_settings
from mamba_dist.errors import TrainingError
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import classify
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.cuda_graph import CudaRecorder
from mamba_dist.train.engines import (
    build_fsdp2,
    decay_groups,
    microstep_recorder,
    optimizer_settings,
)

_STAGES = {"zero-0": 0, "zero-1": 1, "zero-2": 2, "zero-3": 3}
_FSDP2 = "fsdp2"


def _build(spec: StepSpec, batch: Batch) -> Step:
    if spec.variant in _STAGES or spec.variant == _FSDP2:
        return _engine_step(spec, batch)
    with this_device():
        model = _model(spec.config, this_device().type)
    initialize(model, spec.config.model, seed=SEED, gather=zero.gather)
    return plain_step(model, spec, lambda: model(**batch))


def _engine_step(spec: StepSpec, batch: Batch) -> Step:
    world = start_world(timeout_minutes=spec.config.engine.timeout_minutes)
    engine: Engine
    if spec.variant == _FSDP2:
        engine, _ = build_fsdp2(spec.config, world=world)
    else:
        stage = _STAGES[spec.variant]
        engine = _zero(spec.config, stage, world, accumulation=spec.accumulation)

    def step() -> Tensor:
        losses = [
            engine.forward_backward(
                batch, step_tokens=spec.tokens, last=number == spec.accumulation
            )
            for number in range(1, spec.accumulation + 1)
        ]
        stats = engine.step(LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, skip_above=None)
        if stats.skipped:
            raise TrainingError(f"a step was dropped, its gradient norm is {stats.grad_norm}")
        return torch.stack(losses).sum()

    return step


def _zero(config: RunConfig, stage: int, world: World, *, accumulation: int = 1) -> zero.ZeroEngine:
    training = config.training
    engine_config = EngineConfig.model_validate(
        {**config.engine.model_dump(), "kind": "zero", "zero_stage": stage}
    )
    settings = zero_settings(
        engine_config,
        stage=stage,
        precision=training.precision,
        accumulation_steps=accumulation,
    )
    with zero.construction(settings):
        model = _model(config, world.device.type)
    initialize(model, config.model, seed=SEED, gather=zero.gather)
    engine = zero.ZeroEngine(
        model.to(world.device),
        groups=decay_groups(classify(model), training.weight_decay),
        optimizer=optimizer_settings(training),
        settings=settings,
        world=world,
        recorder=_recorder(config, stage, world.device),
    )
    running = engine._engine.zero_optimization_stage()
    assert running == stage, f"zero-{stage} would run ZeRO stage {running}"
    return engine


def _model(config: RunConfig, device_type: str) -> MambaLM:
    return MambaLM(
        config.model,
        backend=_backend(config, device_type),
        activation_checkpointing=config.training.activation_checkpointing,
    )


def _recorder(config: RunConfig, stage: int, device: torch.device) -> CudaRecorder | None:
    if stage == 0 and config.engine.cuda_graphs and _backend(config, device.type) == "gpu":
        return microstep_recorder(config, device)
    return None


def _backend(config: RunConfig, device_type: str) -> str:
    return resolve_backend(config.engine.ops_backend, device_type=device_type)


if __name__ == "__main__":
    serve(_build)
