"""Composition: from a configuration to everything the loop needs."""

import json
import logging
import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mamba_dist.checkpoint.manifest import Progress, TokenizerRecord
from mamba_dist.config import ConfigLoader
from mamba_dist.config.batch import BatchPlan, batch_plan
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.batch import Batch
from mamba_dist.data.loader import TrainLoader, ValidationLoader
from mamba_dist.data.manifest import check_splits, check_vocabulary
from mamba_dist.data.segments import RunOrder
from mamba_dist.data.tokenization import check_tokenizer
from mamba_dist.data.training_sources import RunData, TrainingSource, new_run, open_sources
from mamba_dist.engine import zero
from mamba_dist.engine.base import Engine, OptimizerSettings, ParameterGroup
from mamba_dist.engine.world import World
from mamba_dist.engine.zero_settings import stage_for, zero_settings
from mamba_dist.errors import BackendError, ConfigError, DataError
from mamba_dist.model.flops import flops_per_token
from mamba_dist.model.init import audit, initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import ParamClass, classify, format_table
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.causal_conv1d.gpu import has_kernel as has_convolution_kernel
from mamba_dist.ops.cuda_graph import CudaRecorder
from mamba_dist.ops.ssd.gpu import has_kernel as has_ssd_kernel
from mamba_dist.telemetry.metrics import ConsoleSink, JsonlSink, Metrics, Sink, TensorBoardSink
from mamba_dist.telemetry.progress import progress as progress_bar
from mamba_dist.train.guard import SkipGuard
from mamba_dist.train.meter import Meter
from mamba_dist.train.run_folder import run_folder
from mamba_dist.train.saver import Saver
from mamba_dist.train.schedule import total_steps
from mamba_dist.train.state import load, starting_point
from mamba_dist.train.stop import StopRequest

_log = logging.getLogger(__name__)

_RECORDED_PACKAGES = ("mamba-dist", "torch", "deepspeed", "pyarrow", "tokenizers")


@dataclass(frozen=True)
class Run:
    """Everything one rank needs to train."""

    config: RunConfig
    world: World
    engine: Engine
    engine_name: str
    tokenizer: TokenizerRecord
    versions: dict[str, str]
    start: Progress
    total_steps: int
    steps: Iterator[list[Batch]]
    validation: Iterable[Batch]
    metrics: Metrics
    meter: Meter
    saver: Saver
    guard: SkipGuard
    stop: StopRequest


def build_run(config: RunConfig, *, world: World, stop: StopRequest) -> Run:
    """The run as configured, resumed from its newest whole checkpoint if it has one.

    Raises:
        ConfigError: the config contradicts the data or the number of ranks.
        DataError, CheckpointError, EngineError, ModelError: a part cannot be built as configured.
    """
    plan = batch_plan(config, world.size)
    sources = open_matching_sources(config)
    fresh = new_run(sources, config.data, global_batch_size=plan.global_batch_size)
    start = starting_point(config, world=world, fresh=fresh.order)
    planned_steps(config, start.order)
    engine, classes = _build_engine(config, plan=plan, world=world)
    start = load(start, engine, config, world=world, fresh=fresh.order)
    data = RunData(start.order, sources)
    steps = planned_steps(config, data.order)
    if world.rank == 0:
        _describe_run(config, classes)
    metrics, meter = _build_metrics(config, world=world, start=start.progress, steps=steps)
    tokenizer = sources[0].dataset.manifest.tokenizer
    save_steps = config.checkpoint.save_steps
    return Run(
        config=config,
        world=world,
        engine=engine,
        engine_name=f"zero-{stage_for(config.engine, ranks=world.size)}",
        tokenizer=TokenizerRecord(sha256=tokenizer.sha256, eos_token=tokenizer.eos_token),
        versions=_versions(),
        start=start.progress,
        total_steps=steps,
        steps=_build_steps(config, data, plan=plan, world=world, start=start.progress, end=steps),
        validation=ValidationLoader(
            sources,
            config.data,
            micro_batch_size=plan.micro_batch_size,
            max_sequences=config.training.eval_sequences,
            rank=world.rank,
            world_size=world.size,
            pad_token_id=config.model.pad_token_id,
        ),
        metrics=metrics,
        meter=meter,
        saver=Saver(
            run_folder(config),
            config.checkpoint,
            fragments=engine.fragments,
            ranks=world,
            ranks_on_host=world.local_size,
            copies_ahead=start.progress.step % save_steps + steps - start.progress.step
            > save_steps,
        ),
        guard=SkipGuard(config.training.max_skipped_steps),
        stop=stop,
    )


def open_matching_sources(config: RunConfig) -> tuple[TrainingSource, ...]:
    """The data sets that the config names, in the order of the mixture.

    Raises:
        DataError: one cannot be opened, or was tokenised for another vocabulary, with other splits,
            or with another tokenizer than the others or than the one that now stands at
            data.tokenizer_path.
    """
    sources = open_sources(config.data)
    data = config.data
    for dataset in (source.dataset for source in sources):
        try:
            check_vocabulary(dataset.manifest, config.model.vocab_size)
            check_splits(dataset.manifest, train_split=data.train_split, val_split=data.val_split)
        except DataError as error:
            raise DataError(f"{dataset.path}: {error}") from error
    tokenizer = Path(config.data.tokenizer_path)
    if tokenizer.exists():
        check_tokenizer(sources[0].dataset.manifest, tokenizer)
    else:
        _log.warning(
            "data.tokenizer_path %s does not exist; generation will use the data set's own copy",
            tokenizer,
        )
    return sources


def planned_steps(config: RunConfig, order: RunOrder) -> int:
    """Optimizer steps of the whole run; an epoch of a mixture is as long as all its sources.

    Raises:
        ConfigError: the run is not longer than its warm-up, or longer than its data.
    """
    segment = order.segments[-1]
    steps = total_steps(
        config.training,
        epoch_sequences=sum(source.samples for source in segment.sources),
        global_batch_size=segment.global_batch_size,
        sequence_length=config.data.sequence_length,
        done_steps=segment.first_step,
        done_sequences=segment.first_position,
    )
    if order.end is not None and steps > segment.first_step:
        needed = order.positions(steps - 1).stop
        if needed > order.end:
            possible = (order.end - segment.first_position) // segment.global_batch_size
            raise ConfigError(
                f"data.sources are exhausted after {order.end:,} samples, since all of them have "
                f"max_epochs; the run of {steps:,} steps needs {needed:,}: raise max_epochs of a "
                f"source, or shorten the run to {segment.first_step + possible:,} steps"
            )
    return steps


def _build_engine(
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
    backend = ops_backend(config, device_type=world.device.type)
    recorder = None
    if stage == 0 and config.engine.cuda_graphs and backend == "gpu":
        recorder = microstep_recorder(config, world.device)
    with zero.construction(settings):
        model = MambaLM(
            config.model,
            backend=backend,
            activation_checkpointing=training.activation_checkpointing,
        )
    initialize(model, config.model, seed=training.seed, gather=zero.gather)
    classes = classify(model)
    engine = zero.ZeroEngine(
        model.to(world.device),
        groups=decay_groups(classes, training.weight_decay),
        optimizer=OptimizerSettings(
            beta1=training.adam_beta1, beta2=training.adam_beta2, eps=training.adam_eps
        ),
        settings=settings,
        world=world,
        recorder=recorder,
    )
    # Partitioning is where an initialisation can get lost, so it is looked at afterwards.
    audit(model, config.model, gather=engine.gather)
    return engine, classes


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


def ops_backend(config: RunConfig, *, device_type: str) -> str:
    """The backend of a run's ops on devices of this type.

    Raises:
        BackendError: it cannot work there, or not in a fixed order that is asked for.
    """
    backend = resolve_backend(config.engine.ops_backend, device_type=device_type)
    if config.training.deterministic and backend == "cuda":
        raise BackendError(
            "training.deterministic: mamba-ssm adds up gradients in any order; set "
            "engine.ops_backend: gpu or torch, or training.deterministic: false"
        )
    return backend


def _build_steps(
    config: RunConfig,
    data: RunData,
    *,
    plan: BatchPlan,
    world: World,
    start: Progress,
    end: int,
) -> Iterator[list[Batch]]:
    loader = TrainLoader(
        data,
        config.data,
        plan=plan,
        rank=world.rank,
        world_size=world.size,
        start_step=start.step,
        end_step=end,
        pad_token_id=config.model.pad_token_id,
    )
    return iter(loader)


def _build_metrics(
    config: RunConfig, *, world: World, start: Progress, steps: int
) -> tuple[Metrics, Meter]:
    bar = progress_bar(
        steps,
        "steps",
        description="training",
        enabled=world.rank == 0 and config.telemetry.progress_bar,
        initial=start.step,
    )
    sinks: list[Sink] = []
    if world.rank == 0:
        run_dir = run_folder(config)
        sinks = [JsonlSink(run_dir), ConsoleSink(bar, steps)]
        if config.telemetry.tensorboard:
            sinks.append(TensorBoardSink(run_dir))
    metrics = Metrics(sinks)
    cost = flops_per_token(config.model, sequence_length=config.data.sequence_length)
    meter = Meter(
        metrics,
        log_steps=config.telemetry.log_steps,
        world_size=world.size,
        step_positions=start.global_batch_size * config.data.sequence_length,
        flops_per_token=cost.total_flops,
        advance_to=bar.advance_to,
        loader_workers=config.data.num_workers,
    )
    return metrics, meter


def _describe_run(config: RunConfig, classes: list[ParamClass]) -> None:
    """Leaves the resolved config, the parameter table and the environment in the run folder."""
    run_dir = run_folder(config)
    table = format_table(classes)
    ConfigLoader.save_to_file(config, run_dir / "config.yaml")
    (run_dir / "parameters.txt").write_text(table + "\n", encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
        **_versions(),
    }
    (run_dir / "environment.json").write_text(
        json.dumps(environment, indent=2) + "\n", encoding="utf-8"
    )
    _log.info("%s parameters, table in %s", f"{_elements(classes):,}", run_dir / "parameters.txt")


def _elements(classes: list[ParamClass]) -> int:
    return sum(math.prod(c.shape) for c in classes)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _RECORDED_PACKAGES}
