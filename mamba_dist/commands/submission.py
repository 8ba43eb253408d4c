"""What a job was submitted with, kept in its run folder, where nothing changes it any more.

runs/NAME/submissions/0001/
    config.yaml    the resolved config; the job trains from it
    code/          mamba_dist/ and launch/ as they were; the job runs them
    train.sbatch   the job script; `sbatch` of it submits the same again
    submit.json    commit, versions, command, job id
    slurm-ID.log   what the job prints
runs/NAME/submissions/.lock   held while one is made
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mamba_dist.config.load import ConfigLoader
from mamba_dist.config.schema import RunConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import ConfigError, TrainingError

SUBMISSIONS = "submissions"
CONFIG = "config.yaml"
CODE = "code"
SCRIPT = "train.sbatch"
_LOCK = ".lock"
_PARTIAL = ".partial"
# None is still being written after so long.
_LEFTOVER_S = 86400
ACCOUNT = "submit.json"

# All that a rank runs; data sets and checkpoints lie elsewhere.
_FROZEN = ("mamba_dist", "launch")
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyo", ".*")
_PACKAGES = ("mamba-dist", "torch", "deepspeed", "numpy", "pyarrow", "tokenizers", "triton")


@dataclass(frozen=True)
class Submission:
    """The contents of submit.json."""

    submitted: str
    command: tuple[str, ...]
    ranks: int
    commit: str | None
    """Of the repository; None outside of git, or if git cannot tell."""
    uncommitted_changes: bool | None
    """In what is kept in code/."""
    code_sha256: str
    """Of the names and contents of all files in code/."""
    versions: dict[str, str]
    """Of Python and the packages, as they were found at submission."""
    job: str | None = None
    """None until SLURM has taken it."""


def describe(
    repository: Path, *, command: Sequence[str], ranks: int, warn: Callable[[str], None]
) -> Submission:
    """What is submitted now; `repository` holds mamba_dist/ and launch/.

    `warn` hears why a repository's commit is not known, in git's words.
    """
    commit = changes = None
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        changes = bool(_git(repository, "status", "--porcelain", "--", *_FROZEN))
    except _GitError as error:
        if any((folder / ".git").exists() for folder in (repository, *repository.parents)):
            warn(f"{ACCOUNT} cannot say which commit is submitted, and with which changes: {error}")
    return Submission(
        submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(command),
        ranks=ranks,
        commit=commit,
        uncommitted_changes=changes,
        code_sha256=code_digest(repository),
        versions=_versions(),
    )


def code_digest(folder: Path) -> str:
    """Hexadecimal sha256 of what a rank runs out of `folder`: every name and every byte."""
    digest = hashlib.sha256()
    for top in _FROZEN:
        for path in sorted((folder / top).rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            if path.is_file() and not hidden and path.suffix not in {".pyc", ".pyo"}:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{inside.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def next_folder(run_dir: Path) -> Path:
    """Where the next submission of a run is kept; not there yet."""
    parent = run_dir / SUBMISSIONS
    taken = [int(p.name) for p in parent.iterdir() if p.name.isdigit()] if parent.is_dir() else []
    return parent / f"{max(taken, default=0) + 1:04d}"


@contextmanager
def submitting(run_dir: Path) -> Iterator[None]:
    """While the block lasts, no other process submits a job of this run.

    Raises:
        TrainingError: another one does just now, or it cannot be told.
    """
    path = run_dir / SUBMISSIONS / _LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise _unwritten(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"another submission of {run_dir} is being made now; nothing was submitted"
            ) from error
        except OSError as error:
            raise TrainingError(
                f"the file system of {run_dir} cannot lock files ({error.strerror}); mount it with "
                "locks (Lustre: -o flock), or set training.run_dir=…; nothing was submitted"
            ) from error
        yield


def freeze(
    folder: Path, submission: Submission, *, config: RunConfig, script: str, repository: Path
) -> None:
    """Makes `folder`, which then holds all of a submission: by one rename, never half of it.

    Raises:
        TrainingError: it cannot be written, or another submission has just taken its name.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{_PARTIAL}")
    _remove_leftovers(folder.parent)
    try:
        try:
            partial.mkdir(parents=True)
            ConfigLoader.save_to_file(config, partial / CONFIG)
            for name in _FROZEN:
                shutil.copytree(repository / name, partial / CODE / name, ignore=_NOT_CODE)
            write_text(script, partial / SCRIPT)
            _write_account(partial, submission)
            # A rename onto a folder that holds something fails.
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if folder.exists():
            raise TrainingError(
                f"{folder}: another submission of this run was made at the same time; nothing was "
                "submitted"
            ) from error
        raise _unwritten(folder, error) from error


def submitted_as(folder: Path, submission: Submission, *, job: str) -> None:
    """Notes the id that SLURM gave."""
    _write_account(folder, replace(submission, job=job))


def withdraw(folder: Path) -> None:
    """Takes a submission back that SLURM did not take."""
    shutil.rmtree(folder, ignore_errors=True)


def submitted_jobs(run_dir: Path) -> list[str]:
    """Ids of all jobs that were submitted for a run, oldest first."""
    found = [
        _read_account(path.parent) for path in sorted(run_dir.glob(f"{SUBMISSIONS}/*/{ACCOUNT}"))
    ]
    return [job for account in found if isinstance(job := account.get("job"), str)]


def changed_versions(folder: Path) -> list[str]:
    """Which packages are others than at the submission that `folder` holds, one line each; none
    if it holds no submission."""
    then = _read_account(folder).get("versions")
    if not isinstance(then, Mapping):
        return []
    now = _versions()
    return [
        f"{name} is {now.get(name, 'not installed')}, at submission it was "
        f"{then.get(name, 'not installed')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def _write_account(folder: Path, submission: Submission) -> None:
    try:
        write_text(json.dumps(asdict(submission), indent=2) + "\n", folder / ACCOUNT)
    except ConfigError as error:
        raise TrainingError(str(error)) from error


def _read_account(folder: Path) -> Mapping[str, object]:
    try:
        found = json.loads((folder / ACCOUNT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _remove_leftovers(folder: Path) -> None:
    """Halves of submissions that were killed."""
    for path in folder.glob(f".*{_PARTIAL}"):
        # Gone meanwhile, or another user's.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_S:
                shutil.rmtree(path)


def _unwritten(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path} cannot be written ({error.strerror or error}); nothing was submitted"
    )


class _GitError(Exception):
    """Why git does not answer, on one line."""


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _GitError(str(error)) from error
    if done.returncode:
        raise _GitError(" ".join(done.stderr.split()))
    return done.stdout.strip()
