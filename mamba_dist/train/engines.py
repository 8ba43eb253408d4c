"""The model of a run in its engine, with initial weights."""

import logging
from collections.abc import Iterable

import torch

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import RunConfig, TrainingConfig
from mamba_dist.engine import fsdp2, zero
from mamba_dist.engine.base import Engine, OptimizerSettings, ParameterGroup
from mamba_dist.engine.memory import stage_for
from mamba_dist.engine.world import World
from mamba_dist.engine.zero_settings import zero_settings
from mamba_dist.errors import BackendError
from mamba_dist.model.init import audit, initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import ParamClass, classify
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.causal_conv1d.gpu import has_kernel as has_convolution_kernel
from mamba_dist.ops.cuda_graph import CudaRecorder
from mamba_dist.ops.ssd.gpu import has_kernel as has_ssd_kernel

_log = logging.getLogger(__name__)


def build_engine(
    config: RunConfig, *, plan: BatchPlan, world: World
) -> tuple[Engine, list[ParamClass]]:
    """The engine that the config chooses, with its initial weights, and how its parameters are
    treated.

    Raises:
        BackendError, EngineError, ModelError: it cannot be built as configured.
    """
    engine: Engine
    if config.engine.kind == "fsdp2":
        engine, classes = build_fsdp2(config, world=world)
    else:
        engine, classes = _build_zero(config, plan=plan, world=world)
    # Partitioning is where an initialisation can get lost, so it is looked at afterwards.
    audit(engine.module, config.model, gather=engine.gather)
    return engine, classes


def _build_zero(
    config: RunConfig, *, plan: BatchPlan, world: World
) -> tuple[Engine, list[ParamClass]]:
    training = config.training
    stage = stage_for(config.engine, ranks=world.size)
    if stage != config.engine.zero_stage:
        _log.info(
            "engine.zero_stage: %d shares nothing on one rank; running stage %d, which is the same "
            "without its copies",
            config.engine.zero_stage,
            stage,
        )
    settings = zero_settings(
        config.engine,
        stage=stage,
        precision=training.precision,
        accumulation_steps=plan.accumulation_steps,
    )
    recorder = None
    if stage == 0 and config.engine.cuda_graphs and _backend(config, world) == "gpu":
        recorder = microstep_recorder(config, world.device)
    with zero.construction(settings):
        model = _model(config, world)
    initialize(model, config.model, seed=training.seed, gather=zero.gather)
    classes = classify(model)
    engine = zero.ZeroEngine(
        model.to(world.device),
        groups=decay_groups(classes, training.weight_decay),
        optimizer=optimizer_settings(training),
        settings=settings,
        world=world,
        recorder=recorder,
    )
    return engine, classes


def build_fsdp2(config: RunConfig, *, world: World) -> tuple[fsdp2.Fsdp2Engine, list[ParamClass]]:
    """The engine with its initial weights, and how its parameters are treated."""
    training, chosen = config.training, config.engine
    _log.info("FSDP2 shards each layer over %d ranks", world.size)
    with fsdp2.construction():
        model = _model(config, world)
    classes = classify(model)
    engine = fsdp2.Fsdp2Engine(
        model,
        groups=decay_groups(classes, training.weight_decay),
        optimizer=optimizer_settings(training),
        settings=fsdp2.Fsdp2Settings(
            precision=training.precision,
            gather_dtype=chosen.gather_dtype,
            reduce_dtype=chosen.reduce_dtype,
            reshard_after_forward=chosen.reshard_after_forward,
        ),
        world=world,
        projections=model.projections,
    )
    initialize(model, config.model, seed=training.seed, gather=engine.gather)
    return engine, classes


def _model(config: RunConfig, world: World) -> MambaLM:
    return MambaLM(
        config.model,
        backend=_backend(config, world),
        activation_checkpointing=config.training.activation_checkpointing,
    )


def _backend(config: RunConfig, world: World) -> str:
    return ops_backend(config, device_type=world.device.type)


def optimizer_settings(training: TrainingConfig) -> OptimizerSettings:
    """AdamW's fields of a run."""
    return OptimizerSettings(
        beta1=training.adam_beta1, beta2=training.adam_beta2, eps=training.adam_eps
    )


def microstep_recorder(config: RunConfig, device: torch.device) -> CudaRecorder | None:
    """What records micro-batches of the gpu ops, see `engine.cuda_graphs`; None if they wait for
    the device."""
    model, shapes = config.model, []
    if not has_convolution_kernel(model.d_conv):
        shapes.append(f"model.d_conv {model.d_conv}")
    if model.layer == "mamba2" and not has_ssd_kernel(
        model.d_state, length=config.data.sequence_length
    ):
        shapes.append(f"model.d_state {model.d_state}, {config.data.sequence_length} tokens")
    if shapes:
        _log.info(
            "kernels are launched one by one: %s run in PyTorch's operations, which wait for the "
            "device to know where documents begin (engine.cuda_graphs)",
            " and ".join(shapes),
        )
        return None
    _log.info("each micro-batch is launched as one CUDA graph (engine.cuda_graphs)")
    return CudaRecorder(device)


def decay_groups(classes: Iterable[ParamClass], weight_decay: float) -> list[ParameterGroup]:
    """The parameters that decay, and those that don't."""
    by_decay: dict[bool, list[str]] = {True: [], False: []}
    for each in classes:
        by_decay[each.decay].append(each.name)
    return [
        ParameterGroup(tuple(by_decay[True]), weight_decay),
        ParameterGroup(tuple(by_decay[False]), 0.0),
    ]


def ops_backend(config: RunConfig, *, device_type: str, log: bool = True) -> str:
    """The backend of a run's ops on devices of this type.

    Raises:
        BackendError: it cannot work there, or not in a fixed order that is asked for.
    """
    backend = resolve_backend(config.engine.ops_backend, device_type=device_type, log=log)
    if config.training.deterministic and backend == "cuda":
        raise BackendError(
            "training.deterministic: mamba-ssm adds up gradients in any order; set "
            "engine.ops_backend: gpu or torch, or training.deterministic: false"
        )
    return backend
