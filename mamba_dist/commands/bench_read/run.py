"""bench data-read: opening a tokenised data set and reading windows of it, beside other formats.

The same tokens are written once in each format, under --folder. In each round every variant has
two fresh processes. The first opens, after the files' pages were dropped from the page cache, with
the bytes that this fetched; the second reads windows of 2,049 tokens from the page cache, at random
and in order, as int64 arrays, in short turns with the others'. The limit is a flat file through
numpy.memmap, which knows no documents. A variant whose windows hold other ids gets no figures.

--sparse makes files that are holes for the most part, so that any number of tokens fits on a disk:
what a data set of that size costs to open, seek and read.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.data_report import heading
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.commands.bench_read.report import PACKAGES, Runs, Sizes, document, tables
from mamba_dist.commands.bench_read.sets import SetTokens
from mamba_dist.commands.bench_read.spec import (
    ARROW,
    OURS,
    SPARSE_VARIANTS,
    VARIANTS,
    Job,
)
from mamba_dist.commands.bench_read.turns import (
    WarmReader,
    import_s,
    make_files,
    open_cold,
    warm_files,
)
from mamba_dist.config.text import write_text
from mamba_dist.errors import DataError

_TURNS: Final = 10
_TURN_S: Final = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--tokens",
        type=positive_int,
        default=100_000_000,
        metavar="N",
        help="how many, at least, as 1_000_000_000; default 100_000_000, 0.2 GB a variant",
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="files of holes, ours and memmap's: 1_000_000_000_000 tokens take 0.5 GB",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where the files are made and kept for the next run; default a temporary folder",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="default 5")
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        help=f"of {', '.join(VARIANTS)}; default all, or with --sparse the first two",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the machine or the arguments."""
    if not Path("/proc/self/io").exists():
        return "data-read runs on Linux only: reads and memory are counted by /proc"
    known = SPARSE_VARIANTS if arguments.sparse else VARIANTS
    unknown = sorted(set(arguments.variants or ()) - set(known))
    if unknown:
        return f"--variants: {', '.join(unknown)} unknown here, expected {', '.join(known)}"
    if arguments.folder is not None and not arguments.folder.is_dir():
        return f"--folder: {arguments.folder} is no folder; make it first"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Prints the tables; whether something was measured and every variant gave the same ids.

    Raises:
        DataError: the set that was made cannot be read.
    """
    print(heading(words, PACKAGES), flush=True)
    known = SPARSE_VARIANTS if arguments.sparse else VARIANTS
    chosen = [v for v in known if arguments.variants is None or v in arguments.variants]
    with _root(arguments.folder) as root:
        files = _Files(Path(root), tokens=arguments.tokens, sparse=arguments.sparse)
        found = _measured(arguments, files, chosen)
    print(tables(found), flush=True)
    if arguments.json is not None:
        write_text(json.dumps(document(words, found), indent=2) + "\n", arguments.json)
    return bool(found.measured) and not found.wrong


def _root(given: Path | None) -> AbstractContextManager[Path | str]:
    return nullcontext(given) if given else TemporaryDirectory(prefix="mamba-dist-bench-")


class _Files:
    """The files of all variants, in folders that are complete once they have their name."""

    def __init__(self, root: Path, *, tokens: int, sparse: bool) -> None:
        self._root = root / f"{tokens}-tokens{'-sparse' if sparse else ''}"
        self._tokens = tokens
        self._sparse = sparse

    def folder(self, variant: str) -> Path:
        """Where they are; pyarrow reads ours."""
        return self._root / (OURS if variant == ARROW else variant)

    def make(self, variant: str) -> str | None:
        """Nothing once they are there, otherwise why they are not."""
        folder = self.folder(variant)
        if folder.is_dir():
            return None
        print(f"making the files of {variant}", file=sys.stderr)
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            make_files(
                variant, *map(str, (self.folder(OURS), unfinished, self._tokens, self._sparse))
            )
        except NotMeasuredError as error:
            shutil.rmtree(unfinished)
            return str(error)
        unfinished.rename(folder)
        return None

    def sizes(self, variant: str) -> Sizes:
        """How many and how large they are."""
        states = [p.stat() for p in self.folder(variant).rglob("*") if p.is_file()]
        return Sizes(
            len(states), sum(s.st_size for s in states), sum(512 * s.st_blocks for s in states)
        )


def _measured(arguments: argparse.Namespace, files: _Files, chosen: Sequence[str]) -> Runs:
    absent = {v: why for v in dict.fromkeys((OURS, *chosen)) if (why := files.make(v)) is not None}
    if OURS in absent:
        raise DataError(f"the data set could not be made: {absent[OURS]}")
    ours = SetTokens(files.folder(OURS))
    present = [v for v in chosen if v not in absent]
    found = Runs(ours.tokens, ours.windows, {v: files.sizes(v) for v in present}, absent)
    job = Job("cold", OURS, "", ours.windows, ours.compared(), seconds=_TURN_S)
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}", file=sys.stderr)
        jobs = {v: replace(job, variant=v, folder=str(files.folder(v))) for v in present}
        for variant, each in jobs.items():
            found.note(variant, partial(_open, found, each))
        _warm_round(found, [each for v, each in jobs.items() if v not in absent])
    return found


def _open(found: Runs, job: Job) -> None:
    found.starts_s.setdefault(job.variant, []).append(import_s(job.variant))
    found.cold.setdefault(job.variant, []).append(open_cold(job))


def _warm_round(found: Runs, jobs: Sequence[Job]) -> None:
    """All processes at once, in turns of a moment, since a machine changes its speed."""
    warm_files(jobs)
    with ExitStack() as stack:
        readers = {}
        for job in jobs:
            readers[job.variant] = reader = WarmReader(job)
            stack.callback(reader.close)
        for _ in range(_TURNS):
            for variant, reader in readers.items():
                found.note(variant, reader.take_turn)
        for variant, reader in readers.items():
            found.note(variant, partial(_finish, found, variant, reader))


def _finish(found: Runs, variant: str, reader: WarmReader) -> None:
    found.warm.setdefault(variant, []).append(reader.finish())
