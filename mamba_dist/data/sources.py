"""Which files a corpus consists of, in a fixed order, and how they are cut into units of work.

A corpus is a list of files and folders. Folders are walked recursively in sorted order; hidden
entries are passed over, and what is reachable by several paths (symbolic links) is taken once, at
its first.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from mamba_dist.errors import DataError

FileFormat = Literal["text", "jsonl", "parquet", "arrow"]
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

# Device and inode: the same file under whatever path.
_FileId = tuple[int, int]


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
    """A byte range of a file; `stop_bytes` None reads to its end. For now always the whole file."""

    file: InputFile
    start_bytes: int = 0
    stop_bytes: int | None = None


@dataclass(frozen=True)
class Unit:
    """A piece of work that is committed whole: neighbouring slices, at least one."""

    index: int
    slices: tuple[InputSlice, ...]

    @property
    def bytes(self) -> int:
        """Input bytes of the unit, compressed ones where the file is compressed."""
        return sum(piece.file.bytes for piece in self.slices)

    def __str__(self) -> str:
        first, last = self.slices[0].file.path, self.slices[-1].file.path
        return first if len(self.slices) == 1 else f"the {len(self.slices)} files {first} … {last}"


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


def discover(roots: Sequence[Path], options: DiscoveryOptions) -> Corpus:
    """The corpus below `roots`, in an order that depends only on names.

    Raises:
        DataError: a root does not exist, or no readable input was found.
    """
    files: list[InputFile] = []
    ignored: Counter[str] = Counter()
    seen: set[_FileId] = set()
    duplicates = 0
    for root in roots:
        for path, name in _candidates(root, options):
            kind = _kind(path, options.extensions, named=path == str(root))
            if kind is None:
                ignored[os.path.splitext(path)[1].lower() or "(none)"] += 1
                continue
            status = os.stat(path)
            if _file_id(status) in seen:
                duplicates += 1
                continue
            seen.add(_file_id(status))
            files.append(InputFile(path, name, status.st_size, status.st_mtime_ns, *kind))
    corpus = Corpus(tuple(files), duplicates, tuple(ignored.most_common()))
    if not files:
        raise DataError(_nothing_found(roots, corpus))
    return corpus


def cut_units(files: Iterable[InputFile], *, unit_bytes: int) -> list[Unit]:
    """The files as units of work: neighbours are bundled up to `unit_bytes`.

    Bundling, since each unit costs an fsync or two (a source tree has thousands of small files).
    """
    units: list[Unit] = []
    pending: list[InputSlice] = []
    pending_bytes = 0
    for file in files:
        if pending and pending_bytes + file.bytes > unit_bytes:
            units.append(Unit(len(units), tuple(pending)))
            pending, pending_bytes = [], 0
        pending.append(InputSlice(file))
        pending_bytes += file.bytes
    if pending:
        units.append(Unit(len(units), tuple(pending)))
    return units


def _file_id(status: os.stat_result) -> _FileId:
    return status.st_dev, status.st_ino


def _candidates(root: Path, options: DiscoveryOptions) -> Iterator[tuple[str, str]]:
    if not root.exists():
        raise DataError(f"corpus {root} does not exist; give files or folders of text")
    skip = {_file_id(path.stat()) for path in options.skip if path.exists()}
    if not root.is_dir():
        if _file_id(root.stat()) not in skip:
            yield str(root), root.name
        return
    root_name = os.path.basename(os.path.realpath(root))
    # Folders that were walked, like those to skip, are not entered (again): links may form circles.
    closed = {*skip, _file_id(root.stat())}
    for path, below in _walk(str(root), "", exclude=options.exclude, closed=closed):
        yield path, f"{root_name}/{below}"


def _walk(
    folder: str, below: str, *, exclude: tuple[str, ...], closed: set[_FileId]
) -> Iterator[tuple[str, str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(
            f"cannot list {folder}: {error.strerror}; fix its permissions or --exclude it"
        ) from error
    for entry in entries:
        inner = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith(".") or _is_excluded(entry.name, inner, exclude):
            continue
        if _is_folder(entry):
            folder_id = _file_id(entry.stat())
            if folder_id not in closed:
                closed.add(folder_id)
                yield from _walk(entry.path, inner, exclude=exclude, closed=closed)
        elif entry.is_file() and _file_id(entry.stat()) not in closed:
            yield entry.path, inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise DataError(
            f"cannot follow {entry.path}: {error.strerror}; mend the link or --exclude it"
        ) from error


def _is_excluded(name: str, below: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatchcase(tested, pattern.rstrip("/")) for pattern in patterns for tested in (name, below)
    )


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
    if extension in (".parquet", ".arrow") and compression == "none":
        return ("parquet" if extension == ".parquet" else "arrow"), compression
    # A file that the user named, or an extension he asked for, is text unless known better.
    if extension in TEXT_EXTENSIONS or extensions is not None or named:
        return "text", compression
    return None


def _nothing_found(roots: Sequence[Path], corpus: Corpus) -> str:
    where = ", ".join(str(root) for root in roots)
    if corpus.ignored_extensions:
        other = ", ".join(f"{count} {name}" for name, count in corpus.ignored_extensions[:5])
        return (
            f"no text found in {where}, only files of other kinds ({other}); name the extensions "
            "to read as text, such as --extensions .log,.html"
        )
    return f"no files found in {where}; expected .txt, .md, code, .jsonl, .parquet or .arrow"
