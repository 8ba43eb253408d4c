"""Options of sbatch for a training job, from a user's words or environment: which may be given.

sbatch takes abbreviations of its long options; so does this, or `--arra=0-3` would pass unseen.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from mamba_dist.commands.job_script import option_of

# What launch/submit.py decides by options of its own.
_OWN = {
    **{name: name for name in ("nodes", "gpus-per-node", "time", "partition", "account", "qos")},
    **{name: name for name in ("job-name", "cpus-per-task", "constraint", "mem")},
    **{name: name for name in ("requeue", "no-requeue")},
    **dict.fromkeys(("ntasks-per-node", "tasks-per-node"), "ranks-per-node"),
    "signal": "stop-before",
    **dict.fromkeys(("gpus", "gpus-per-socket", "tres-per-task"), "gpus-per-node"),
}
# Another number or order of processes than the script starts, or no job at all.
_IMPOSSIBLE = (
    *("array", "chdir", "ntasks", "gpus-per-task", "ntasks-per-gpu", "distribution"),
    *("test-only", "wait", "wrap", "help", "usage", "version"),
)
# What a job prints is kept beside what it was submitted with, from its first start to its last.
_LOG = ("output", "error", "open-mode")
# sbatch refuses one of the first together with the second.
_RIVALS = {"mem-per-cpu": "mem", "mem-per-gpu": "mem", "cpus-per-gpu": "cpus-per-task"}

DEPENDENCY = "dependency"
# None is the beginning of an option of sbatch that is not here, so that a shorter name is no other.
_KNOWN = (*_OWN, *_IMPOSSIBLE, *_LOG, *_RIVALS, DEPENDENCY)

_GPUS = re.compile(r"(?:gres[/:])?gpu(?![^:=])")

# How sbatch finds the cluster, and whose place and bill a user may set once for all submissions.
_KEPT = frozenset(
    (
        *("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SBATCH_CLUSTERS"),
        *("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION"),
        *("SBATCH_CONSTRAINT", "SBATCH_WCKEY"),
    )
)


def read_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options that may be given, their names in full, and what is wrong with the others.

    `words` are --name or --name=value each.
    """
    options: dict[str, str] = {}
    problems = []
    for word in words:
        try:
            written, value = option_of(word)
            name = _in_full(written)
            _refuse(name, value)
        except ValueError as error:
            problems.append(str(error))
            continue
        options[name] = value
    return options, problems


def rivals_of(options: Collection[str]) -> set[str]:
    """Options that sbatch would not take together with `options`."""
    return {rival for name, rival in _RIVALS.items() if name in options}


def environment_of_sbatch(
    environment: Mapping[str, str], *, options: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The environment to call sbatch in, and which settings of the user are left out of it.

    sbatch puts SBATCH_… before the directives of a script: those of what launch/submit.py decides,
    and those of `options`, would undo them. SLURM_… in an interactive allocation tell of that one.
    """
    kept_of_slurm = _KEPT - {f"SBATCH_{name.upper().replace('-', '_')}" for name in options}
    kept = {
        name: value
        for name, value in environment.items()
        if name in kept_of_slurm or not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))
    }
    ignored = sorted(
        name
        for name in environment
        if name.startswith("SBATCH_") and name not in kept and name not in _KEPT
    )
    return kept, ignored


def _in_full(written: str) -> str:
    if written in _KNOWN:
        return written
    longer = [name for name in _KNOWN if name.startswith(written)]
    if len(longer) > 1:
        raise ValueError(f"--{written} may be --{' or --'.join(longer)}; write it in full")
    return longer[0] if longer else written


def _refuse(name: str, value: str) -> None:
    if name == "gres" and any(map(_GPUS.match, value.split(","))):
        raise ValueError("instead of --gres=gpu give --gpus-per-node to launch/submit.py itself")
    if name in _IMPOSSIBLE:
        raise ValueError(f"a training job cannot have --{name}")
    if name in _LOG:
        raise ValueError(f"the log stays in the run folder, without --{name}")
    if name in _OWN:
        raise ValueError(f"instead of --{name} give --{_OWN[name]} to launch/submit.py itself")
