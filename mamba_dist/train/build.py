"""Composition: from a configuration to everything the loop needs."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
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
from mamba_dist.engine.base import Engine
from mamba_dist.engine.memory import engine_name
from mamba_dist.engine.world import World
from mamba_dist.errors import ConfigError, DataError
from mamba_dist.model.flops import flops_per_token
from mamba_dist.model.param_groups import ParamClass, format_table
from mamba_dist.telemetry.metrics import ConsoleSink, JsonlSink, Metrics, Sink
from mamba_dist.telemetry.progress import progress as progress_bar
from mamba_dist.telemetry.tensorboard_sink import TensorBoardSink
from mamba_dist.train.engines import build_engine
from mamba_dist.train.guard import SkipGuard
from mamba_dist.train.meter import Meter
from mamba_dist.train.run_folder import run_folder
from mamba_dist.train.saver import Saver
from mamba_dist.train.schedule import total_steps
from mamba_dist.train.state import load, starting_point
from mamba_dist.train.steps import Steps
from mamba_dist.train.stop import StopRequest
from mamba_dist.train.watchdog import Peer, Watchdog, started

_log = logging.getLogger(__name__)

_RECORDED_PACKAGES = ("mamba-dist", "torch", "deepspeed", "pyarrow", "tokenizers")


@dataclass(frozen=True)
class Prepared:
    """What a config comes to with its data, before anything large is built."""

    plan: BatchPlan
    sources: tuple[TrainingSource, ...]
    fresh: RunOrder
    """The order of samples that the run would begin with."""


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
    steps: Steps
    validation: Iterable[Batch]
    metrics: Metrics
    meter: Meter
    saver: Saver
    guard: SkipGuard
    watchdog: Watchdog
    stop: StopRequest


def prepare(config: RunConfig, *, ranks: int) -> Prepared:
    """The data and the batches of a run on so many ranks.

    Raises:
        ConfigError: the config contradicts the data or the number of ranks.
        DataError: a data set cannot be opened, or does not fit the config.
    """
    plan = batch_plan(config, ranks)
    sources = open_matching_sources(config)
    fresh = new_run(sources, config.data, global_batch_size=plan.global_batch_size)
    return Prepared(plan, sources, fresh.order)


def build_run(config: RunConfig, prepared: Prepared, *, world: World, stop: StopRequest) -> Run:
    """The run as configured, resumed from its newest whole checkpoint if it has one.

    Raises:
        ConfigError: the config contradicts the checkpoint, or the run is longer than its data.
        DataError, CheckpointError, EngineError, ModelError: a part cannot be built as configured.
    """
    plan, sources, fresh = prepared.plan, prepared.sources, prepared.fresh
    start = starting_point(config, world=world, fresh=fresh)
    planned_steps(config, start.order)
    engine, classes = build_engine(config, plan=plan, world=world)
    start = load(start, engine, config, world=world, fresh=fresh)
    data = RunData(start.order, sources)
    steps = planned_steps(config, data.order)
    if world.rank == 0:
        _describe_run(config, classes)
    metrics, meter = _build_metrics(config, world=world, start=start.progress, steps=steps)
    tokenizer = sources[0].dataset.manifest.tokenizer
    saver = _build_saver(
        config, engine, world=world, first_step=start.progress.step, last_step=steps
    )
    return Run(
        config=config,
        world=world,
        engine=engine,
        engine_name=engine_name(config.engine, ranks=world.size),
        tokenizer=TokenizerRecord(sha256=tokenizer.sha256, eos_token=tokenizer.eos_token),
        versions=package_versions(),
        start=start.progress,
        total_steps=steps,
        steps=_build_steps(
            config, data, plan=plan, world=world, step=start.progress.step, end=steps
        ),
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
        saver=saver,
        guard=SkipGuard(config.training, world=world),
        watchdog=_build_watchdog(config, world, saver),
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
    taken = order.taken(segment.first_position)
    read = segment.first_position - order.passed_over
    steps = total_steps(
        config.training,
        epoch_sequences=sum(source.samples for source in segment.sources),
        global_batch_size=segment.global_batch_size,
        sequence_length=config.data.sequence_length,
        done_steps=segment.first_step,
        # What was passed over shortens no run: the samples after it take its place.
        done_sequences=read,
        left_behind=max(0, read - sum(taken[s.fingerprint] for s in segment.sources)),
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


def _build_saver(
    config: RunConfig, engine: Engine, *, world: World, first_step: int, last_step: int
) -> Saver:
    save_steps = config.checkpoint.save_steps
    return Saver(
        run_folder(config),
        config.checkpoint,
        fragments=engine.fragments,
        ranks=world,
        ranks_on_host=world.local_size,
        copies_ahead=first_step % save_steps + last_step - first_step > save_steps,
    )


def _build_watchdog(config: RunConfig, world: World, saver: Saver) -> Watchdog:
    pids = world.from_all_ranks(os.getpid())
    starts = world.from_all_ranks(started(os.getpid()))
    # The first rank's clock, since the folder must be one.
    began = datetime.fromtimestamp(int(world.from_all_ranks(time.time())[0]), UTC)
    return Watchdog(
        run_folder(config) / "hangs" / began.strftime("%Y-%m-%dT%H-%M-%SZ"),
        rank=world.rank,
        timeout_s=config.engine.hang_timeout_s,
        peers=[
            Peer(rank, int(pids[rank]), int(starts[rank]))
            for rank in world.on_this_host()
            if rank != world.rank
        ],
        writing=lambda: saver.writing,
    )


def _build_steps(
    config: RunConfig, data: RunData, *, plan: BatchPlan, world: World, step: int, end: int
) -> Steps:
    def begin(order: RunOrder, step: int) -> Generator[list[Batch]]:
        loader = TrainLoader(
            RunData(order, data.sources),
            config.data,
            plan=plan,
            rank=world.rank,
            world_size=world.size,
            start_step=step,
            end_step=end,
            pad_token_id=config.model.pad_token_id,
        )
        return iter(loader)

    return Steps(begin, data.order, step)


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
        **package_versions(),
    }
    (run_dir / "environment.json").write_text(
        json.dumps(environment, indent=2) + "\n", encoding="utf-8"
    )
    _log.info("%s parameters, table in %s", f"{_elements(classes):,}", run_dir / "parameters.txt")


def _elements(classes: list[ParamClass]) -> int:
    return sum(math.prod(c.shape) for c in classes)


def package_versions() -> dict[str, str]:
    """What a run's results depend on."""
    return {name: version(name) for name in _RECORDED_PACKAGES}
