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
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from mamba_dist.commands.job_script import limit_in_words, limit_seconds, render
from mamba_dist.commands.sbatch_options import (
    DEPENDENCY,
    environment_of_sbatch,
    read_options,
    rivals_of,
)
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
    submitting,
    withdraw,
)
from mamba_dist.commands.submit_arguments import parser
from mamba_dist.config.batch import batch_plan
from mamba_dist.config.load import LoadedConfig, load_config
from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import ConfigError, MambaDistError, SchedulerError

TEMPLATE = Path("launch/slurm/train.sbatch")

# The repository whose mamba_dist runs here.
_CHECKOUT = Path(__file__).resolve().parents[2]

# sbatch's manual: "the signal may be sent up to 60 seconds earlier".
_SIGNAL_EARLY_S = 60

# Python cuts PYTHONPATH at the first; with the second sbatch takes %j in the log's name literally.
_CUT = ":\\"


def main(argv: Sequence[str] | None = None, *, environment: Mapping[str, str]) -> int:
    """The exit code of the command line `argv`; `environment` is the one that a job gets, too."""
    arguments = parser().parse_args(argv)
    command = sys.argv if argv is None else ["launch/submit.py", *argv]
    try:
        return _Submitter(arguments, command, environment).run()
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


class _Submitter:
    def __init__(
        self, arguments: argparse.Namespace, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self._asked = arguments
        self._command = command
        self._problems: list[str] = []
        self._place: dict[str, str] = {}
        self._plan = ""
        self._limit = ""
        # Despite some problems there is a job script, which SLURM can be asked about.
        self._has_script = True
        self._check_options()
        self._environment, ignored = environment_of_sbatch(environment, options=self._place)
        if ignored:
            _warn(f"{', '.join(ignored)} ignored; give what you mean as an option, see --help")

    def run(self) -> int:
        self._check_checkout()
        self._check_time()
        self._check_ranks()
        loaded = self._load()
        script = answer = ""
        if loaded is not None:
            # Before the checks, which take seconds: of two submissions at once one gets the name.
            folder = next_folder(_run_dir(loaded.config)).absolute()
            self._check_run(loaded.config)
            if self._has_script:
                script = self._script(folder)
                answer = self._try(script)
        if not has_slurm() and not self._asked.dry_run:
            self._problems.append("sbatch is not installed here; submit from a login node")
        if loaded is None or self._problems:
            raise self._all_problems()
        if self._asked.dry_run:
            print(f"{self._plan}\n{self._limit}\n\n{script}")
            print(f"{answer}\nnothing was submitted", file=sys.stderr)
            return 0
        job = self._submit(loaded.config, folder, script)
        again = "starts again by itself" if self._asked.requeue else "is not started again"
        rows = {
            "plan": self._plan.replace("\n", "\n      "),
            "limit": self._limit,
            "SLURM": answer,
            "job": f"{job}, {again} after its time limit",
            "kept": str(folder),
            "log": f"{folder}/slurm-{job}.log",
        }
        for name, text in rows.items():
            print(f"{name:<5} {text}", file=sys.stderr)
        print(job)
        return 0

    def _submit(self, config: RunConfig, folder: Path, script: str) -> str:
        """The id of the job."""
        here, run_dir = Path.cwd(), _run_dir(config)
        with submitting(run_dir):
            # Another job can have been submitted since it was asked before.
            self._check_others(run_dir)
            if self._problems:
                raise self._all_problems()
            submission = describe(here, command=self._command, ranks=self._ranks, warn=_warn)
            freeze(folder, submission, config=config, script=script, repository=here)
            try:
                job = submit(folder / SCRIPT, environment=self._environment)
            except SchedulerError:
                withdraw(folder)
                raise
            try:
                submitted_as(folder, submission, job=job)
            except MambaDistError as error:
                # The job is in the queue all the same.
                _warn(str(error))
        return job

    def _check_checkout(self) -> None:
        here = Path.cwd().resolve()
        if not TEMPLATE.is_file():
            self._has_script = False
            self._problems.append(f"found no {TEMPLATE} in {here}; submit from the repository")
        elif here != _CHECKOUT:
            self._problems.append(
                f"the code of {here} would be frozen, but it is the mamba_dist of {_CHECKOUT} that "
                "checks here; run PYTHONPATH=. python launch/submit.py …, or submit from there"
            )

    def _check_time(self) -> None:
        try:
            limit_s = limit_seconds(self._asked.time)
        except ValueError as error:
            self._has_script = False
            self._problems.append(f"--time: {error}")
            return
        self._limit = f"{limit_in_words(limit_s)} for each start"
        shortest_s = self._asked.stop_before + _SIGNAL_EARLY_S
        if limit_s is not None and limit_s <= shortest_s:
            self._problems.append(
                f"--time {self._asked.time} is {limit_in_words(limit_s)}, and the ranks are told "
                f"to stop up to {shortest_s} s before its end (--stop-before "
                f"{self._asked.stop_before}, and SLURM's {_SIGNAL_EARLY_S}): nothing would be "
                "trained; give a longer one"
            )

    def _check_ranks(self) -> None:
        gpus, ranks = self._asked.gpus_per_node.count, self._asked.ranks_per_node
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
        further, problems = read_options(self._asked.sbatch_option)
        self._place |= further
        self._problems += [f"--sbatch-option: {problem}" for problem in problems]
        for name, value in [*self._place.items(), ("job-name", self._asked.job_name or "")]:
            if not value.isprintable():
                self._has_script = False
                self._problems.append(f"--{name} {value!r} has letters that cannot be printed")

    @property
    def _ranks_per_node(self) -> int:
        return int(self._asked.gpus_per_node.count or self._asked.ranks_per_node or 1)

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
            self._has_script = False
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
        if DEPENDENCY in self._place or not has_slurm():
            return
        try:
            others = waiting_or_running(
                submitted_jobs(run_dir),
                scripts_in=(run_dir / SUBMISSIONS).absolute(),
                environment=self._environment,
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
        gpus = asked.gpus_per_node
        directives: dict[str, str | None] = {
            **dict.fromkeys(rivals_of(self._place)),
            "job-name": asked.job_name or folder.parents[1].name,
            "output": str(folder).replace("%", "%%") + "/slurm-%j.log",
            "chdir": str(Path.cwd()),
            "nodes": str(asked.nodes),
            "ntasks-per-node": str(self._ranks_per_node),
            "gpus-per-node": str(gpus) if gpus.count else None,
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
            try:
                return try_submission(Path(file.name), environment=self._environment)
            except SchedulerError as error:
                self._problems.append(str(error))
                return ""

    def _all_problems(self) -> ConfigError:
        count = len(self._problems)
        if count == 1:
            return ConfigError(f"nothing was submitted: {self._problems[0]}")
        indented = [problem.replace("\n", "\n    ") for problem in self._problems]
        lines = "".join(f"\n  - {problem}" for problem in indented)
        return ConfigError(f"nothing was submitted, {count} problems:{lines}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _run_dir(config: RunConfig) -> Path:
    assert config.training.run_dir is not None, "set by loading a file"
    return Path(config.training.run_dir)


def _is_wrong(letter: str) -> bool:
    return letter in _CUT or not letter.isprintable()


def _can_be_written(folder: Path) -> bool:
    """Whether `folder` is there and can be written, or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
