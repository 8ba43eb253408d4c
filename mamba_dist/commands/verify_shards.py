"""tools/verify_shards.py: whether every file of a data set is what its manifest says.

Exit codes: 0 clean; 2 damaged, or no data set; anything else is a crash.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mamba_dist.data.manifest import read_manifest
from mamba_dist.data.verification import Depth, Problem, dataset_problems
from mamba_dist.errors import MambaDistError
from mamba_dist.telemetry.progress import progress

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    depth: Depth = "quick" if arguments.quick else "sha256" if arguments.sha256 else "xxh3"
    try:
        return _run(arguments.dataset, depth)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(folder: Path, depth: Depth) -> int:
    manifest = read_manifest(folder)
    size_bytes = sum(shard.bytes for shard in manifest.shards)
    begun_at = time.monotonic()
    problems: list[Problem] = []
    with progress(size_bytes, "B", description="verifying", enabled=depth != "quick") as bar:
        for problem in dataset_problems(folder, manifest, depth=depth, advance=bar.advance):
            problems.append(problem)
            bar.show(f"{folder}/{problem}")
    seconds = max(time.monotonic() - begun_at, 1e-9)
    print(f"{len(manifest.shards):,} shards, {size_bytes / 1e9:.3f} GB: {_what(depth)}", end="")
    print("" if depth == "quick" else f" in {seconds:.1f} s, {size_bytes / 1e9 / seconds:.2f} GB/s")
    if not problems:
        print("clean")
        return 0
    files = len({problem.file for problem in problems})
    print(
        f"error: {len(problems)} problems in {files} files of {folder}, listed above; restore "
        "these files, or tokenize again with --overwrite",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


def _what(depth: Depth) -> str:
    if depth == "quick":
        return "sizes and footers looked at, contents not read"
    return f"every byte read, {'xxh3 and sha256' if depth == 'sha256' else 'xxh3'} compared"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/verify_shards.py",
        description="Check every file of a data set against its manifest, and list all that is "
        "wrong by file, record batch and byte.",
    )
    parser.add_argument("dataset", type=Path, help="data set folder")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="sizes and footers only")
    depth.add_argument(
        "--sha256",
        action="store_true",
        help="compare the sha256 too, which the fingerprint vouches for; slower",
    )
    return parser
