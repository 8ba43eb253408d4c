"""Log lines on standard error: all from rank 0, warnings from the others, which name their rank."""

import logging
import sys


def setup_logging(*, rank: int, world_size: int) -> None:
    """Sends the package's log lines to standard error."""
    package = logging.getLogger("mamba_dist")
    package.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    who = f"[rank {rank}] " if world_size > 1 and rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    package.addHandler(handler)
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False
