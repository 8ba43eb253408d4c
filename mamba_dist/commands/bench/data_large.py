"""bench data-large: tokenising a corpus of any size, and the memory of each process meanwhile.

The corpus is made of the documents of a real one: each is the first half of one and the second half
of another, with a number between, so that no two are the same. Memory is what /proc tells of the
tokenising process and its workers as it goes on: VmHWM, the most that was resident so far.
"""

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.data import TOKENIZE, corpus_texts
from mamba_dist.commands.bench.data_report import heading
from mamba_dist.config.text import write_text
from mamba_dist.data.manifest import read_manifest
from mamba_dist.data.preparation.fast_backends import AUTO, FAST_BACKENDS, REFERENCE
from mamba_dist.data.preparation.sources import DiscoveryOptions, discover
from mamba_dist.errors import DataError

_FILE_BYTES: Final = 256_000_000
_ROWS: Final = 10
_SAMPLE_S: Final = 0.25
_MB: Final = 1e-6


@dataclass(frozen=True)
class Sample:
    """VmHWM in bytes of the processes that ran at an instant: the main one first."""

    at_s: float
    peaks: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--text-mb", type=positive_int, default=10_000, metavar="MB", help="default 10,000"
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what its documents are made of; default Python's own standard library",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", required=True)
    parser.add_argument("--workers", type=positive_int, default=2, help="default 2")
    parser.add_argument(
        "--backend",
        choices=(AUTO, REFERENCE, *FAST_BACKENDS),
        default=AUTO,
        help="of the tokenizer, as data_prep/tokenize.py takes it; default auto",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        required=True,
        help="an empty folder for corpus and data set, three times as much as the text",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the machine or the arguments."""
    if not Path("/proc/self/status").exists():
        return "data-large runs on Linux only: memory is read from /proc"
    if not arguments.folder.is_dir() or any(arguments.folder.iterdir()):
        return f"--folder: {arguments.folder} is no empty folder; make one"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Prints speed and memory; whether the tokenising came to its end.

    Raises:
        DataError: the corpus cannot be read.
    """
    print(heading(words), flush=True)
    corpus, output = arguments.folder / "corpus", arguments.folder / "set"
    roots = arguments.corpus or [Path(sysconfig.get_path("stdlib"))]
    files = discover(roots, DiscoveryOptions(exclude=("site-packages", "dist-packages"))).files
    text_bytes = write_corpus(
        corpus, list(corpus_texts(files)), text_bytes=arguments.text_mb * 1_000_000
    )
    options = ["--tokenizer", arguments.tokenizer, "--output", output]
    options += ["--workers", arguments.workers, "--backend", arguments.backend]
    begun_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", TOKENIZE, str(corpus), *map(str, options)], stdout=subprocess.DEVNULL
    )
    samples = _watch(process, begun_at)
    if process.returncode:
        print(f"the tokenising ended with {process.returncode}", file=sys.stderr)
        return False
    tokens = sum(shard.tokens for shard in read_manifest(output).shards)
    seconds = time.monotonic() - begun_at
    print(
        f"{text_bytes * _MB:,.0f} MB of text, {tokens:,} tokens, {seconds:,.0f} s, "
        f"{text_bytes * _MB / seconds:,.1f} MB/s with {arguments.workers} workers\n"
    )
    print(table(samples), flush=True)
    if arguments.json is not None:
        listed = [[sample.at_s, *sample.peaks] for sample in samples]
        write_text(json.dumps({"command": list(words), "samples": listed}) + "\n", arguments.json)
    return True


def write_corpus(folder: Path, sources: Sequence[str], *, text_bytes: int) -> int:
    """Writes files of JSON lines with at least so many bytes of text; gives how many."""
    if not sources:
        raise DataError("--corpus: no text; give more of it")
    folder.mkdir()
    rng = random.Random(0)
    written = documents = 0
    while written < text_bytes:
        end = min(text_bytes, written + _FILE_BYTES)
        path = folder / f"{written // _FILE_BYTES:05d}.jsonl"
        with path.open("w", encoding="utf-8") as lines:
            while written < end:
                one, other = rng.choice(sources), rng.choice(sources)
                text = f"{one[: len(one) // 2]}\n{documents}\n{other[len(other) // 2 :]}"
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                documents += 1
    return written


def table(samples: Sequence[Sample]) -> str:
    """Some instants, evenly spread, and how much the workers' memory grew over the last three
    quarters of the time.
    """
    if not samples:
        return "it ended before its memory was looked at"
    width = max(len(sample.peaks) for sample in samples)
    heads = ["s", "main, MB", *(f"worker {number}, MB" for number in range(1, width))]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for number in sorted(
        {len(samples) * row // _ROWS for row in range(_ROWS)} | {len(samples) - 1}
    ):
        sample = samples[number]
        cells = [f"{sample.at_s:,.0f}", *(f"{peak * _MB:,.0f}" for peak in sample.peaks)]
        lines.append("| " + " | ".join(cells) + " |")
    full = [sample for sample in samples if len(sample.peaks) == width]
    early, late = full[len(full) // 4].peaks, full[-1].peaks
    grown = max(b / a for a, b in zip(early[1:] or early, late[1:] or late, strict=True))
    return "\n".join(
        [*lines, "", f"At the end a worker's peak is at most {grown:.2f}x that of a quarter of it."]
    )


def _watch(process: "subprocess.Popen[bytes]", begun_at: float) -> list[Sample]:
    samples = []
    while process.poll() is None:
        pids = [process.pid, *_children(process.pid)]
        peaks = [peak for peak in map(_peak_bytes, pids) if peak]
        if peaks:
            samples.append(Sample(time.monotonic() - begun_at, tuple(peaks)))
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SAMPLE_S)
    return samples


def _children(pid: int) -> Iterable[int]:
    """Those that run a program of Python's; its helper for named resources is none of them."""
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    yield int(child)


def _peak_bytes(pid: int) -> int | None:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
