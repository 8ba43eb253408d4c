"""A whole run on one rank: start the world, build, train, leave."""

import logging

import torch

from mamba_dist.checkpoint.free_memory import available_bytes
from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.world import World, launcher_pids, spare_memory, start_world, stop_world
from mamba_dist.errors import EngineError
from mamba_dist.telemetry.log import setup_logging
from mamba_dist.train.build import build_run
from mamba_dist.train.loop import train
from mamba_dist.train.memory import GIB, KEPT_OVER_ALLOCATED, memory_plan, memory_problem
from mamba_dist.train.plan import describe_plan
from mamba_dist.train.run_folder import held_run_folder
from mamba_dist.train.stop import EXIT_STOPPED, StopRequest, watch_launcher

__all__ = ["describe_plan", "run_training"]

_log = logging.getLogger(__name__)


def _require_memory(config: RunConfig, world: World) -> None:
    """Raises EngineError, on all ranks, if any of them cannot hold what the run certainly takes.

    Where memory is only short, ranks on CPUs are told to spare it.
    """
    on_gpu = world.device.type == "cuda"
    sharing = 1 if on_gpu else len(world.on_this_host())
    available = torch.cuda.mem_get_info(world.device)[0] if on_gpu else available_bytes()
    problem = memory_problem(
        config, ranks=world.size, ranks_on_host=sharing, on_gpu=on_gpu, available=available
    )
    peak = memory_plan(config, ranks=world.size, on_gpu=on_gpu).peak
    if not on_gpu and problem is None and peak * sharing * KEPT_OVER_ALLOCATED > available:
        _log.info(
            "%.1f GiB are free for some %.1f: what is freed goes back to the system at once, which "
            "takes some time",
            available / GIB,
            peak * sharing / GIB,
        )
        spare_memory()
    # No rank may take memory before all have looked how much there is.
    short = world.from_all_ranks(float(problem is not None))
    if any(short):
        error = EngineError(problem or "another rank has too little memory; its own message says")
        error.of_one_rank = problem is not None and not short[0]
        raise error


def run_training(config: RunConfig) -> int:
    """Exit code of the run: 0 at its last step, 75 after a stop with a checkpoint.

    Raises:
        MambaDistError: whatever the user can mend.
    """
    stop = StopRequest()
    stop.listen()
    watch_launcher(stop, launcher_pids())
    try:
        world = start_world(
            timeout_minutes=config.engine.timeout_minutes,
            deterministic=config.training.deterministic,
        )
        setup_logging(rank=world.rank, world_size=world.size)
        _require_memory(config, world)
        with held_run_folder(config, world=world) as folder:
            run = build_run(config, world=world, stop=stop)
            if run.start.step >= run.total_steps:
                _log.warning(
                    "nothing to train: the run is at step %d, and is %d steps long",
                    run.start.step,
                    run.total_steps,
                )
            try:
                with run.watchdog:
                    outcome = train(run, folder)
            except Exception:
                run.saver.close()
                raise
            finally:
                run.metrics.close()
            world.barrier()
    finally:
        stop_world()
        stop.release()
    if outcome.stopped_by is None:
        _log.info("finished at step %d", outcome.progress.step)
        return 0
    _log.info(
        "stopped by %s after step %d; start again to continue",
        outcome.stopped_by,
        outcome.progress.step,
    )
    return EXIT_STOPPED
