"""The command line of launch/submit.py."""

import argparse
import re
from dataclasses import dataclass

from mamba_dist.commands.arguments import not_negative_int, positive_int

_GPUS = re.compile(r"(?:(?P<kind>[A-Za-z][\w.-]*):)?(?P<count>\d+)")


@dataclass(frozen=True)
class Gpus:
    """What a job asks of each node."""

    count: int
    """0 is a job on CPUs."""
    kind: str = ""
    """As the cluster's gres.conf names it; "" takes any."""

    def __str__(self) -> str:
        """As sbatch takes it."""
        return f"{self.kind}:{self.count}" if self.kind else str(self.count)


def gpus(text: str) -> Gpus:
    """The GPUs that `text` says: N or TYPE:N.

    Raises:
        argparse.ArgumentTypeError: it says none; argparse turns it into its message.
    """
    match = _GPUS.fullmatch(text)
    if match is None or (match["kind"] and not int(match["count"])):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; give N or TYPE:N")
    return Gpus(int(match["count"]), match["kind"] or "")


def parser() -> argparse.ArgumentParser:
    """It reads what a job is, how much it takes and how long it lives."""
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description="Submit a training job to SLURM. Config, data, batch arithmetic and job "
        "are checked first; config and code are copied into the run folder, and the job runs from "
        "there. Prints the job's id.",
    )
    add = parser.add_argument
    add("--config", required=True, help="YAML or JSON file, see configs/")
    add("overrides", nargs="*", metavar="section.field=value", help="replace fields of the config")
    add("--dry-run", action="store_true", help="check, print plan and job script, submit nothing")
    _add_size(parser.add_argument_group("how much"))
    place = parser.add_argument_group("where, as sbatch takes it")
    for name in ("partition", "account", "qos", "constraint", "job-name"):
        place.add_argument(f"--{name}")
    place.add_argument(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as --sbatch-option=--exclusive; may be repeated",
    )
    _add_life(parser.add_argument_group("how long it lives"))
    return parser


def _add_size(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--nodes", type=positive_int, default=1, help="default 1")
    add("--gpus-per-node", type=gpus, required=True, help="N or TYPE:N, one rank each; 0: CPUs")
    add("--ranks-per-node", type=positive_int, help="with --gpus-per-node 0")
    add("--time", required=True, help="limit of each start: 90 (min), 08:00:00, 2-12 (days-hours)")
    add("--cpus-per-task", type=positive_int, help="of each rank; default in the job script")
    add("--mem", help="of each node; default 0, all of it")


def _add_life(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start again and go on after the time limit, a preemption, a node or rank that failed",
    )
    add(
        "--stop-before",
        type=positive_int,
        default=300,
        metavar="SECONDS",
        help="tell the ranks to stop so long before the limit, SLURM up to 60 s earlier: time for "
        "one step and one save; default %(default)s",
    )
    add("--max-restarts", type=not_negative_int, default=100, help="in all; default %(default)s")
    add(
        "--max-in-vain",
        type=positive_int,
        default=3,
        help="starts in a row that make no new checkpoint; default %(default)s",
    )
