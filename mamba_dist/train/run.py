"""A whole run on one rank: start the world, check it, build, train, leave."""

import logging

from mamba_dist.config.schema import RunConfig
from mamba_dist.engine.world import World, launcher_pids, start_world, stop_world
from mamba_dist.telemetry.log import setup_logging
from mamba_dist.train.build import build_run
from mamba_dist.train.loop import Outcome, train
from mamba_dist.train.plan import describe_plan
from mamba_dist.train.preflight import prepare_and_check
from mamba_dist.train.record import StartRecord, recorded_start
from mamba_dist.train.run_folder import HeldFolder, held_run_folder, run_folder
from mamba_dist.train.stop import EXIT_STOPPED, StopRequest, watch_launcher

__all__ = ["describe_plan", "run_training"]

_log = logging.getLogger(__name__)


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
        stop.ranks_met()
        setup_logging(rank=world.rank, world_size=world.size)
        with (
            held_run_folder(config, world=world) as folder,
            recorded_start(run_folder(config), world=world) as record,
        ):
            record.heed(stop)
            for line in world.account:
                _log.info("%s", line)
            folder.settle()
            outcome = _train(config, folder, record, world=world, stop=stop)
            _tell(outcome)
            record.end(outcome)
    finally:
        stop_world()
        stop.release()
    return 0 if outcome.stopped_by is None else EXIT_STOPPED


def _train(
    config: RunConfig, folder: HeldFolder, record: StartRecord, *, world: World, stop: StopRequest
) -> Outcome:
    prepared = prepare_and_check(config, folder, world=world)
    run = build_run(config, prepared, world=world, stop=stop)
    # Only now is it known that what the run goes on from is whole. A start that commits the save of
    # a killed one is to leave as much room for the next as that would have.
    run.saver.clear_old()
    record.train(run)
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
    return outcome


def _tell(outcome: Outcome) -> None:
    step = outcome.progress.step
    if outcome.stopped_by is None:
        _log.info("finished at step %d", step)
    else:
        _log.info("stopped by %s after step %d; start again to continue", outcome.stopped_by, step)
