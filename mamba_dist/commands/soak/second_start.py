"""A second start in the folder of a run that is at work."""

import signal
from pathlib import Path
from typing import Final

from mamba_dist.commands.soak.launch import Launch, Spread
from mamba_dist.commands.soak.processes import send

_REFUSED: Final = 2
_TIMEOUT_S: Final = 120.0


def second_start_faults(launch: Launch, config: Path) -> list[str]:
    """What is wrong with how a second start is refused while `launch` holds the folder.

    The ranks of the first are suspended meanwhile, as a job is: they keep the lock, and the run
    does not come to its end while the second still imports.
    """
    if not launch.wait_until(lambda: launch.steps_done() >= 1, timeout_s=_TIMEOUT_S):
        return ["it came to no step that a second start could have met"]
    ranks = launch.ranks()
    send(ranks, signal.SIGSTOP)
    try:
        second = Launch(launch.folder / "second", config, Spread("python", 1, "zero-0"))
        try:
            code = second.wait(timeout_s=_TIMEOUT_S)
        finally:
            second.end()
    finally:
        send(ranks, signal.SIGCONT)
    if code != _REFUSED or "another run is training in it" not in second.log():
        return [f"a second start ended with {code}: {second.log()[-300:]}"]
    return []
