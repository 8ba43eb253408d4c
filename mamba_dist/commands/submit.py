"""launch/submit.py: submits a training job to SLURM, checked and frozen.

Everything is checked before anything waits in a queue, and all mistakes are told at once. The job
trains from a copy of config and code in the run folder, so that both may be edited meanwhile. The
job's id is all that stands on standard output.

Exit codes: 0 submitted, or with --dry-run all is well; 2 a mistake that the message explains.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.commands.job_script import limit_seconds, option_of, render
from mamba_dist.commands.scheduler import has_slurm, submit, try_submission, waiting_or_running
from mamba_dist.commands.submission import (
    CODE,
    CONFIG,
    SCRIPT,
    SUBMISSIONS,
    describe,
    freeze,
    next_folder,
    submitted_as,
    submitted_jobs,
    withdraw,
)
from mamba_dist.config.batch import batch_plan
from mamba_dist.config.load import LoadedConfig, load_config
from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import ConfigError, MambaDistError, SchedulerError

TEMPLATE = Path("launch/slurm/train.sbatch")

# sbatch's manual: "the signal may be sent up to 60 seconds earlier".
_SIGNAL_EARLY_S = 60

# Options of sbatch that submit.py has itself, some under another name.
_OWN_OPTIONS = {
    **dict.fromkeys(("nodes", "gpus-per-node", "time", "partition", "account", "qos"), ""),
    **dict.fromkeys(("job-name", "cpus-per-task", "constraint", "mem", "requeue"), ""),
    "no-requeue": "",
    "ntasks-per-node": "ranks-per-node",
    "signal": "stop-before",
}
_IMPOSSIBLE_OPTIONS = ("array", "chdir", "ntasks", "test-only", "wait", "wrap")
# What a job prints is kept beside what it was submitted with, from its first start to its last.
_LOG_OPTIONS = ("output", "error", "open-mode")

# Python cuts PYTHONPATH at the first; with the second sbatch takes %j in the log's name literally.
_CUT = ":\\"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    command = sys.argv if argv is None else ["launch/submit.py", *argv]
    try:
        return _Submitter(arguments, command).run()
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class _Submitter:
    def __init__(self, arguments: argparse.Namespace, command: Sequence[str]) -> None:
        self._asked = arguments
        self._command = command
        self._problems: list[str] = []
        self._place: dict[str, str] = {}
        self._plan = ""

    def run(self) -> int:
        self._check_time()
        self._check_ranks()
        self._check_options()
        if not TEMPLATE.is_file():
            self._problems.append(
                f"found no {TEMPLATE} in {Path.cwd()}; submit from the repository"
            )
        loaded = self._load()
        if loaded is not None:
            # Before the checks, which take seconds: of two submissions at once one gets the name.
            folder = next_folder(_run_dir(loaded.config)).absolute()
            self._check_run(loaded.config)
        if not has_slurm() and not self._asked.dry_run:
            self._problems.append("sbatch is not installed here; submit from a login node")
        if loaded is None or self._problems:
            raise self._all_problems()
        script = self._script(folder)
        answer = self._try(script)
        if self._asked.dry_run:
            print(f"{self._plan}\n\n{script}")
            print(f"{answer}\nnothing was submitted", file=sys.stderr)
            return 0
        return self._submit(loaded.config, folder, script, answer)

    def _submit(self, config: RunConfig, folder: Path, script: str, answer: str) -> int:
        here = Path.cwd()
        submission = describe(here, command=self._command, ranks=self._ranks)
        freeze(folder, submission, config=config, script=script, repository=here)
        try:
            job = submit(folder / SCRIPT)
        except SchedulerError:
            withdraw(folder)
            raise
        try:
            submitted_as(folder, submission, job=job)
        except MambaDistError as error:
            # The job is in the queue all the same.
            print(f"warning: {error}", file=sys.stderr)
        again = "starts again by itself" if self._asked.requeue else "is not started again"
        rows = {
            "plan": self._plan.replace("\n", "\n      "),
            "SLURM": answer,
            "job": f"{job}, {again} after its time limit",
            "kept": str(folder),
            "log": f"{folder}/slurm-{job}.log",
        }
        for name, text in rows.items():
            print(f"{name:<5} {text}", file=sys.stderr)
        print(job)
        return 0

    def _check_time(self) -> None:
        try:
            limit_s = limit_seconds(self._asked.time)
        except ValueError as error:
            self._problems.append(f"--time: {error}")
            return
        shortest_s = self._asked.stop_before + _SIGNAL_EARLY_S
        if limit_s is not None and limit_s <= shortest_s:
            self._problems.append(
                f"--time {self._asked.time} is {limit_s} s, and the ranks are told to stop up to "
                f"{shortest_s} s before its end (--stop-before {self._asked.stop_before}, and "
                f"SLURM's {_SIGNAL_EARLY_S}): nothing would be trained; give a longer one"
            )

    def _check_ranks(self) -> None:
        gpus, ranks = self._asked.gpus_per_node, self._asked.ranks_per_node
        if not gpus and ranks is None:
            self._problems.append("--gpus-per-node 0 trains on CPUs: give --ranks-per-node")
        if gpus and ranks not in (None, gpus):
            self._problems.append(
                f"--ranks-per-node {ranks} with --gpus-per-node {gpus}: each rank has one GPU; "
                "leave --ranks-per-node out"
            )

    def _check_options(self) -> None:
        """Options that go to sbatch as they are."""
        for name in ("partition", "account", "qos", "constraint", "mem", "cpus_per_task"):
            if getattr(self._asked, name) is not None:
                self._place[name.replace("_", "-")] = str(getattr(self._asked, name))
        for word in self._asked.sbatch_option:
            try:
                name, value = option_of(word)
            except ValueError as error:
                self._problems.append(f"--sbatch-option: {error}")
                continue
            if name in _IMPOSSIBLE_OPTIONS:
                self._problems.append(f"--sbatch-option: a training job cannot have --{name}")
            elif name in _LOG_OPTIONS:
                self._problems.append(
                    f"--sbatch-option: the log stays in the run folder, without --{name}"
                )
            elif name in _OWN_OPTIONS:
                own = _OWN_OPTIONS[name] or name
                self._problems.append(f"--sbatch-option: give --{own} to launch/submit.py itself")
            self._place[name] = value
        for name, value in [*self._place.items(), ("job-name", self._asked.job_name or "")]:
            if not value.isprintable():
                self._problems.append(f"--{name} {value!r} has letters that cannot be printed")

    @property
    def _ranks_per_node(self) -> int:
        return int(self._asked.gpus_per_node or self._asked.ranks_per_node or 1)

    @property
    def _ranks(self) -> int:
        return int(self._asked.nodes) * self._ranks_per_node

    def _load(self) -> LoadedConfig | None:
        try:
            loaded = load_config(self._asked.config, self._asked.overrides)
        except ConfigError as error:
            self._problems.append(str(error))
            return None
        for line in loaded.account:
            print(line, file=sys.stderr)
        return loaded

    def _check_run(self, config: RunConfig) -> None:
        run_dir = _run_dir(config)
        if not _can_be_written(run_dir):
            self._problems.append(f"{run_dir} cannot be written; set training.run_dir=…")
        wrong = {letter for letter in str(run_dir.absolute()) if _is_wrong(letter)}
        if wrong:
            self._problems.append(
                f"{str(run_dir)!r} has {', '.join(map(repr, sorted(wrong)))}, at which Python or "
                "SLURM would misread the path; set training.run_dir=…"
            )
        self._check_others(run_dir)
        cut = True
        try:
            batch_plan(config, self._ranks)
        except ConfigError as error:
            cut = False
            self._problems.append(f"{self._asked.nodes} nodes: {error}")
        # torch takes seconds to import; what needs none of it is checked before.
        # DeepSpeed talks on standard output, where the job's id is to stand alone.
        with redirect_stdout(sys.stderr):
            from mamba_dist.train.build import open_matching_sources
            from mamba_dist.train.plan import describe_plan

        try:
            if cut:
                self._plan = describe_plan(config, world_size=self._ranks)
            else:
                open_matching_sources(config)
        except MambaDistError as error:
            self._problems.append(str(error))

    def _check_others(self, run_dir: Path) -> None:
        """One job at a time trains in a folder; a second one would end as soon as it starts."""
        waits = any(word.startswith("--dependency") for word in self._asked.sbatch_option)
        if waits or not has_slurm():
            return
        try:
            others = waiting_or_running(
                submitted_jobs(run_dir), scripts_in=(run_dir / SUBMISSIONS).absolute()
            )
        except SchedulerError as error:
            self._problems.append(str(error))
            return
        if others:
            self._problems.append(
                f"job {', '.join(others)} of {run_dir} waits or runs; scancel it, set "
                f"training.run_dir=…, or wait for it: --sbatch-option=--dependency=afterany:"
                f"{':'.join(others)}"
            )

    def _script(self, folder: Path) -> str:
        template = TEMPLATE.read_text(encoding="utf-8")
        asked = self._asked
        directives: dict[str, str | None] = {
            "job-name": asked.job_name or folder.parents[1].name,
            "output": str(folder).replace("%", "%%") + "/slurm-%j.log",
            "chdir": str(Path.cwd()),
            "nodes": str(asked.nodes),
            "ntasks-per-node": str(self._ranks_per_node),
            "gpus-per-node": str(asked.gpus_per_node) if asked.gpus_per_node else None,
            "time": asked.time,
            "signal": f"USR1@{asked.stop_before}",
            "requeue" if asked.requeue else "no-requeue": "",
        }
        directives |= self._place
        return render(
            template,
            directives,
            variables={
                "MAMBA_DIST_PYTHON": sys.executable,
                "MAMBA_DIST_CODE": str(folder / CODE),
                "MAMBA_DIST_MAX_RESTARTS": str(asked.max_restarts),
                "MAMBA_DIST_MAX_IN_VAIN": str(asked.max_in_vain),
            },
            words=["--config", str(folder / CONFIG)],
            header=f"{TEMPLATE} as submitted by\n\n    {shlex.join(self._command)}\n\n"
            "sbatch of this file submits the same again, config and code as they were.",
        )

    def _try(self, script: str) -> str:
        if not has_slurm():
            return "not tried with SLURM: sbatch is not installed here"
        with tempfile.NamedTemporaryFile("w", suffix=f"-{SCRIPT}", encoding="utf-8") as file:
            file.write(script)
            file.flush()
            return try_submission(Path(file.name))

    def _all_problems(self) -> ConfigError:
        count = len(self._problems)
        if count == 1:
            return ConfigError(f"nothing was submitted: {self._problems[0]}")
        lines = "".join(f"\n  - {problem}" for problem in self._problems)
        return ConfigError(f"nothing was submitted, {count} problems:{lines}")


def _run_dir(config: RunConfig) -> Path:
    assert config.training.run_dir is not None, "set by loading a file"
    return Path(config.training.run_dir)


def _is_wrong(letter: str) -> bool:
    return letter in _CUT or not letter.isprintable()


def _can_be_written(folder: Path) -> bool:
    """Whether `folder` is there and can be written, or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _parser() -> argparse.ArgumentParser:
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
    add("--gpus-per-node", type=not_negative_int, required=True, help="one rank each; 0 for CPUs")
    add("--ranks-per-node", type=positive_int, help="with --gpus-per-node 0")
    add("--time", required=True, help="limit of each start: 90, 08:00:00, 2-12 (days-hours)")
    add("--cpus-per-task", type=positive_int, help=f"of each rank; default in {TEMPLATE}")
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
