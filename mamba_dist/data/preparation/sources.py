"""Which files a corpus consists of, in a fixed order, and how they are cut into units of work.

A corpus is a list of files, folders and globs (`**` for folders of any depth). Folders are walked
recursively in sorted order; hidden entries are passed over, and what is reachable by several paths
(symbolic links, a glob and a name) is taken once, at its first.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from mamba_dist.data.preparation.folder_walk import (
    FileId,
    expand,
    file_id,
    glob_folder,
    status_of,
    unreadable,
    walk,
)
from mamba_dist.errors import DataError

FileFormat = Literal["text", "jsonl", "parquet", "arrow", "arrow_stream"]
Compression = Literal["none", "gzip", "zstd", "xz"]

JSON_LINES_EXTENSIONS = frozenset({".jsonl", ".ndjson", ".json"})
_TEXT = """
    .txt .text .md .markdown .rst .tex .org .adoc .py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu
    .cuh .java .kt .scala .groovy .js .jsx .mjs .ts .tsx .go .rs .rb .php .pl .pm .lua .r .jl .swift
    .m .mm .cs .fs .vb .hs .ml .mli .clj .el .lisp .scm .erl .ex .exs .dart .zig .nim .d .f .f90
    .f95 .pas .asm .s .sh .bash .zsh .ps1 .bat .sql .cmake .mk .proto .tcl .v .sv .vhd .vhdl
"""
TEXT_EXTENSIONS = frozenset(_TEXT.split())
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}

_MOST_SLICES = 4096
_ARROW_FILE = b"ARROW1"  # an Arrow stream, without an index, begins otherwise


@dataclass(frozen=True)
class DiscoveryOptions:
    """What a walk takes and leaves.

    `extensions` (with the dot) replaces the default ones; `exclude` are globs against any folder or
    file name, or against the whole path below the corpus; `skip` are files and folders that are not
    input.
    """

    extensions: frozenset[str] | None = None
    exclude: tuple[str, ...] = ()
    skip: tuple[Path, ...] = ()


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus. `name` is root name / path below, wherever the corpus lies."""

    path: str
    name: str
    bytes: int
    changed_at_ns: int
    format: FileFormat
    compression: Compression


@dataclass(frozen=True)
class InputSlice:
    """The lines, row groups or record batches that begin in a range of a file's bytes.

    Text, compressed files and Arrow streams have no such pieces: one slice is the whole file.
    """

    file: InputFile
    start_bytes: int
    stop_bytes: int

    @property
    def bytes(self) -> int:
        """Length of the range."""
        return self.stop_bytes - self.start_bytes

    @property
    def is_whole(self) -> bool:
        """Whether the file has no other slice."""
        return self.bytes == self.file.bytes


def whole(file: InputFile) -> InputSlice:
    """The slice that is all of a file."""
    return InputSlice(file, 0, file.bytes)


@dataclass(frozen=True)
class Unit:
    """A piece of work that is committed whole: neighbouring slices, at least one."""

    index: int
    slices: tuple[InputSlice, ...]

    @property
    def bytes(self) -> int:
        """Input bytes of the unit, compressed ones where the file is compressed."""
        return sum(piece.bytes for piece in self.slices)

    def __str__(self) -> str:
        first, last = self.slices[0], self.slices[-1]
        if len(self.slices) > 1:
            return f"the {len(self.slices)} files {first.file.path} … {last.file.path}"
        where = "" if first.is_whole else f" (bytes {first.start_bytes} to {first.stop_bytes - 1})"
        return f"{first.file.path}{where}"


@dataclass(frozen=True)
class _Found:
    """A file that may be input; `is_named`: the user gave it, or its extension."""

    path: str
    name: str
    is_named: bool


@dataclass(frozen=True)
class Corpus:
    """The files found, in order, and what was passed over."""

    files: tuple[InputFile, ...]
    duplicates: int
    ignored_extensions: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.bytes for file in self.files)


def discover(roots: Sequence[Path | InputFile], options: DiscoveryOptions) -> Corpus:
    """The corpus below `roots`, in an order that depends only on names.

    A root that is an InputFile is taken as it is.

    Raises:
        DataError: a root does not exist, or no readable input was found.
    """
    files: list[InputFile] = []
    ignored: Counter[str] = Counter()
    seen: set[FileId] = set()
    duplicates = 0
    for root in roots:
        if isinstance(root, InputFile):
            files.append(root)
            continue
        for found in _candidates(root, options):
            status = status_of(found.path)
            if status is None:
                ignored["(broken link)"] += 1
                continue
            kind = _kind(found.path, options.extensions, named=found.is_named)
            if kind is None:
                ignored[os.path.splitext(found.path)[1].lower() or "(none)"] += 1
                continue
            if file_id(status) in seen:
                duplicates += 1
                continue
            seen.add(file_id(status))
            files.append(
                InputFile(found.path, found.name, status.st_size, status.st_mtime_ns, *kind)
            )
    corpus = Corpus(tuple(files), duplicates, tuple(ignored.most_common()))
    if not files:
        raise DataError(_nothing_found(roots, corpus))
    return corpus


def cut_units(files: Iterable[InputFile], *, unit_bytes: int) -> list[Unit]:
    """The files as units of work: large ones are cut, neighbours are bundled, to `unit_bytes`.

    Bundling, since each unit costs an fsync or two (a source tree has thousands of small files); no
    more than _MOST_SLICES, since files cost time however small.
    """
    units: list[Unit] = []
    pending: list[InputSlice] = []
    pending_bytes = 0
    for piece in (piece for file in files for piece in _slices(file, unit_bytes)):
        is_full = len(pending) == _MOST_SLICES or pending_bytes + piece.bytes > unit_bytes
        if pending and is_full:
            units.append(Unit(len(units), tuple(pending)))
            pending, pending_bytes = [], 0
        pending.append(piece)
        pending_bytes += piece.bytes
    if pending:
        units.append(Unit(len(units), tuple(pending)))
    return units


def _slices(file: InputFile, unit_bytes: int) -> list[InputSlice]:
    if file.compression != "none" or file.format in ("text", "arrow_stream"):
        return [whole(file)]
    count = max(1, -(-file.bytes // unit_bytes))
    cuts = [file.bytes * number // count for number in range(count + 1)]
    return [InputSlice(file, start, stop) for start, stop in pairwise(cuts)]


def _candidates(root: Path, options: DiscoveryOptions) -> Iterator[_Found]:
    skip = {file_id(path.stat()) for path in options.skip if os.path.exists(path)}
    try:
        status = root.stat()
    except OSError as error:
        if glob.has_magic(str(root)):
            yield from _matches(root, options, skip)
            return
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(
                f"corpus {root} does not exist; give files or folders of text"
            ) from error
        raise unreadable(root, error) from error
    if stat.S_ISDIR(status.st_mode):
        yield from _below(root, options, skip)
    elif not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"corpus {root} is no file that can be read in parts and again; pipe it in and give -, "
            "as in `zcat *.gz | python data_prep/tokenize.py -`"
        )
    elif file_id(status) not in skip:
        yield _Found(str(root), root.name, is_named=True)


def _below(root: Path, options: DiscoveryOptions, skip: set[FileId]) -> Iterator[_Found]:
    # Folders that were walked, like those to skip, are not entered (again): links may form circles.
    closed = {*skip, file_id(root.stat())}
    root_name = _folder_name(root)
    for path, below in walk(str(root), exclude=options.exclude, closed=closed):
        yield _Found(path, f"{root_name}/{below}", is_named=False)


def _matches(pattern: Path, options: DiscoveryOptions, skip: set[FileId]) -> Iterator[_Found]:
    folder_name = _folder_name(glob_folder(pattern))
    matched = expand(pattern, exclude=options.exclude, closed=skip)
    if not matched:
        raise DataError(f"corpus {pattern} matches no file or folder; check the pattern")
    for path, below in matched:
        status = status_of(str(path))
        if status is not None and stat.S_ISDIR(status.st_mode):
            # Below `**` all that lies in a folder is matched by itself.
            if "**" not in pattern.parts and file_id(status) not in skip:
                yield from _below(path, options, skip)
        elif status is None or (stat.S_ISREG(status.st_mode) and file_id(status) not in skip):
            is_named = pattern.suffix == path.suffix != ""
            yield _Found(str(path), f"{folder_name}/{below}", is_named=is_named)


def _folder_name(folder: Path) -> str:
    return os.path.basename(os.path.realpath(folder))


def _kind(
    path: str, extensions: frozenset[str] | None, *, named: bool
) -> tuple[FileFormat, Compression] | None:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression: Compression = "none"
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        compression = _COMPRESSIONS[suffixes.pop()]
    extension = suffixes[-1] if suffixes else ""
    if extensions is not None and extension not in extensions:
        return None
    if extension in JSON_LINES_EXTENSIONS:
        return "jsonl", compression
    if extension == ".parquet" and compression == "none":
        return "parquet", compression
    if extension == ".arrow" and compression == "none":
        return ("arrow" if _begins_with(path, _ARROW_FILE) else "arrow_stream"), compression
    # A file that the user named, or an extension he asked for, is text unless known better.
    if extension in TEXT_EXTENSIONS or extensions is not None or named:
        return "text", compression
    return None


def _begins_with(path: str, magic: bytes) -> bool:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(len(magic)) == magic
    except OSError as error:
        raise unreadable(path, error) from error


def _nothing_found(roots: Sequence[Path | InputFile], corpus: Corpus) -> str:
    where = ", ".join(str(root) for root in roots)
    if corpus.ignored_extensions:
        other = ", ".join(f"{count} {name}" for name, count in corpus.ignored_extensions[:5])
        return (
            f"no text found in {where}, only files of other kinds ({other}); name the extensions "
            "to read as text, such as --extensions .log,.html"
        )
    return f"no files found in {where}; expected .txt, .md, code, .jsonl, .parquet or .arrow"
