"""What lies in a folder, or matches a glob: in sorted order, through links that may form circles.

Hidden entries are passed over, unless a glob names them. Links that lead nowhere are given like
files: who takes them counts them.
"""

import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence, Set
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from mamba_dist.errors import DataError

# Device and inode: the same file under whatever path.
FileId = tuple[int, int]

_BROKEN_LINK = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def file_id(status: os.stat_result) -> FileId:
    """The file's id, of what `os.stat` says."""
    return status.st_dev, status.st_ino


def unreadable(path: object, error: OSError) -> DataError:
    """What to say of an input that the system refuses to read."""
    return DataError(f"cannot read {path}: {error.strerror or error}; fix or --exclude it")


def status_of(path: str) -> os.stat_result | None:
    """What `os.stat` says; nothing of a link that leads nowhere, or to itself.

    Raises:
        DataError: the system refuses to tell.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _BROKEN_LINK:
            return None
        raise unreadable(path, error) from error


def walk(folder: str, *, exclude: Sequence[str], closed: set[FileId]) -> Iterator[tuple[str, str]]:
    """The files below a folder: path, and path below it.

    Folders in `closed` are not entered, nor files there given; folders that are entered join it.

    Raises:
        DataError: a folder cannot be listed.
    """
    levels = [("", iter(_listed(folder)))]
    while levels:
        below, entries = levels[-1]
        entry = next(entries, None)
        if entry is None:
            levels.pop()
            continue
        inner = os.path.join(below, entry.name)
        if entry.name.startswith(".") or _is_excluded(entry.name, inner, exclude):
            continue
        status = status_of(entry.path)
        if status is None:
            yield entry.path, inner
        elif file_id(status) in closed:
            continue
        elif stat.S_ISDIR(status.st_mode):
            closed.add(file_id(status))
            levels.append((inner, iter(_listed(entry.path))))
        elif stat.S_ISREG(status.st_mode):
            yield entry.path, inner


def glob_folder(pattern: Path) -> Path:
    """The folder below which a glob finds things: all of its path that is no pattern."""
    parts = list(takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
    return Path(*parts)


def expand(pattern: Path, *, exclude: Sequence[str], closed: Set[FileId]) -> list[tuple[Path, str]]:
    """What a glob matches: path, and path below `glob_folder`, sorted by path.

    As `glob.glob(recursive=True)`, but a folder is entered once for each part of the pattern, and
    one that cannot be listed is an error. Folders in `closed` are not entered.

    Raises:
        DataError: a folder cannot be listed.
    """
    folder = glob_folder(pattern)
    parts = pattern.parts[len(folder.parts) :]
    found: list[tuple[Path, str]] = []
    seen: set[tuple[FileId, int]] = set()
    pending = [(str(folder), "", 0)]
    while pending:
        path, below, at = pending.pop()
        status = status_of(path)
        if status is None or file_id(status) in closed or (file_id(status), at) in seen:
            continue
        seen.add((file_id(status), at))
        part, is_last = parts[at], at == len(parts) - 1
        inner_folders: list[tuple[str, str, int]] = []
        if part == "**" and not is_last:
            inner_folders.append((path, below, at + 1))
        for name, is_folder in _matched(path, part, below=below, exclude=exclude):
            inner = os.path.join(below, name)
            if is_last and not (part == "**" and is_folder):
                found.append((Path(path, name), inner))
            elif is_folder:
                inner_folders.append((os.path.join(path, name), inner, at + (part != "**")))
        pending += reversed(inner_folders)
    return sorted(found, key=lambda one: os.fsencode(one[0]))


def _matched(
    folder: str, part: str, *, below: str, exclude: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """The entries of a folder that match a part of a glob and are not excluded, and whether they
    are folders.
    """
    if not glob.has_magic(part):
        is_excluded = _is_excluded(part, os.path.join(below, part), exclude)
        if not is_excluded and os.path.lexists(path := os.path.join(folder, part)):
            yield part, os.path.isdir(path)
        return
    for entry in _listed(folder):
        is_shown = not entry.name.startswith(".") or part.startswith(".")
        if not is_shown or not fnmatchcase(entry.name, part):
            continue
        # First, since what is excluded may be what cannot be followed.
        if not _is_excluded(entry.name, os.path.join(below, entry.name), exclude):
            yield entry.name, _is_folder(entry)


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(
            f"cannot list {folder}: {error.strerror}; fix its permissions or --exclude it"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _BROKEN_LINK:
            return False
        raise DataError(
            f"cannot follow {entry.path}: {error.strerror}; mend the link or --exclude it"
        ) from error


def _is_excluded(name: str, below: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatchcase(tested, pattern.rstrip("/")) for pattern in patterns for tested in (name, below)
    )
