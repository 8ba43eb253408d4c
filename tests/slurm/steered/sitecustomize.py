"""Ranks that a test steers by variables: every Python that finds this folder loads it by itself.

STEP_S          each step takes so much longer
KILL_AT         STEP or STEP:START: the second rank kills itself after that step (of that start)
SLEEP_AT        the same: all ranks sleep there, longer than any time limit
"""

import os
import signal
import time

from mamba_dist.train.watchdog import Watchdog

_step_done = Watchdog.step_done


def _is_now(name: str, step: int) -> bool:
    at, _, start = os.environ.get(name, "").partition(":")
    return at == str(step) and start in ("", os.environ.get("SLURM_RESTART_COUNT", "0"))


def _steered(self: Watchdog, step: int) -> None:
    _step_done(self, step)
    time.sleep(float(os.environ.get("STEP_S", "0")))
    if _is_now("KILL_AT", step) and os.environ.get("SLURM_PROCID") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if _is_now("SLEEP_AT", step):
        time.sleep(1000)


Watchdog.step_done = _steered
