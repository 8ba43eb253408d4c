"""Errors a user can cause or meet. Each message says what was found, what was expected and what to
do.

Programming mistakes inside the package raise Python's own exceptions; a script's `main()` prints
these classes as one line and exits, and lets everything else show its traceback.
"""

from pathlib import Path


class MambaDistError(Exception):
    """Base of every error that a user can mend; commands print it without a traceback.

    `of_one_rank` marks an error that the other ranks do not have; it is printed by the rank that
    has it, where one that all ranks share is printed by the first. `exit_code` is what a script
    ends with.
    """

    of_one_rank = False
    exit_code = 2


class ConfigError(MambaDistError):
    """A config file or override is wrong, or two of its fields contradict each other."""


class BackendError(MambaDistError):
    """An ops backend was asked for by name and cannot run here."""


class DataError(MambaDistError):
    """A corpus, tokenizer, shard or manifest is missing, damaged or does not match."""


class ChangedPartError(DataError):
    """What was made of one unit of a corpus is not on the disk any more as it was written."""

    def __init__(self, path: Path, unit: int) -> None:
        super().__init__(f"{path} changed since it was written; check the disk")
        self.unit = unit


class ModelError(MambaDistError):
    """A model cannot be built, classified or initialised as configured."""


class EngineError(MambaDistError):
    """The distributed engine cannot start or cannot honour the configuration."""


class CheckpointError(MambaDistError):
    """A checkpoint is missing, damaged, or belongs to another model or data set."""


class DamagedCheckpointError(CheckpointError):
    """Bytes of a checkpoint are not what was written, or not there."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint cannot be read now, which says nothing of its bytes.

    Its exit code is that of a stop: start again.
    """

    exit_code = 75
    reason = ""
    """What the system said."""

    @classmethod
    def of(cls, path: Path, error: OSError) -> "UnreadableCheckpointError":
        """That of a file that the system does not give."""
        reason = error.strerror or str(error)
        made = cls(
            f"{path}: cannot be read now ({reason}), which need not be damage; start again when it "
            "can, or move its step-… folder away to use an older one"
        )
        made.reason = reason
        return made


class UnwrittenCheckpointError(CheckpointError):
    """A checkpoint could not be written; those before are untouched.

    Its exit code is that of a stop: start again, from the one before.
    """

    exit_code = 75


class OtherVersionError(CheckpointError):
    """A checkpoint is as it was written, by a version of mamba-dist that says what this does not
    know."""


class SchedulerError(MambaDistError):
    """SLURM is absent, refuses a job or does not answer."""


class TrainingError(MambaDistError):
    """Training cannot go on: for example another run holds the run folder."""


class StartError(TrainingError):
    """A run cannot start where it was started; the same on all ranks, so the first one prints it
    for all."""


class ShortageError(StartError):
    """A run cannot start now, for want of what somebody else has just then.

    Its exit code is sysexits' EX_TEMPFAIL, as after a stop: start again.
    """

    exit_code = 75


class DivergedError(TrainingError):
    """Training is broken, and would be again: too many skipped steps, or a loss that is not finite.

    Its exit code is sysexits' EX_DATAERR: a launcher that starts again on 75 must not do so.
    """

    exit_code = 65
