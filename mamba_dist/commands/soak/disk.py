"""A small disk for the run folder, so that a full one costs nobody else."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mamba_dist.errors import TrainingError

_SIZE: Final = 8 << 20
_CHUNK: Final = bytes(1 << 16)
_FILLER = "filler"


class Disk:
    """A folder; `why_not` says why it cannot be filled, if it is no disk of its own."""

    def __init__(self, folder: Path, why_not: str | None) -> None:
        self.folder = folder
        self.why_not = why_not

    def fill(self, *, left_bytes: int) -> None:
        """Writes until nothing more goes onto it, and gives so many bytes back.

        What was deleted since is filled too when it is called again.
        """
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (len(_CHUNK), 1):
                with _until_full():
                    while True:
                        os.write(descriptor, _CHUNK[:size])
            os.truncate(descriptor, max(0, os.fstat(descriptor).st_size - left_bytes))
        finally:
            os.close(descriptor)

    def make_room(self) -> None:
        """Takes away what `fill` wrote."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.folder / _FILLER


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A tmpfs mounted at `folder` while the block lasts, or the folder itself if that may not be.

    What is on it then is copied into the folder, so that a failed run can be looked at.

    Raises:
        TrainingError: it could not be unmounted.
    """
    folder.mkdir(parents=True)
    mounted = _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "soak", str(folder))
    if mounted:
        yield Disk(folder, f"no disk of its own could be mounted ({mounted})")
        return
    try:
        yield Disk(folder, None)
    finally:
        kept = folder.with_name(f"{folder.name}.copy")
        for command in (("cp", "-a", str(folder), str(kept)), ("umount", str(folder))):
            if failed := _run(*command):
                raise TrainingError(f"{' '.join(command)}: {failed}; unmount it by hand")
        folder.rmdir()
        kept.rename(folder)


@contextmanager
def _until_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _run(*command: str) -> str | None:
    """What went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None
