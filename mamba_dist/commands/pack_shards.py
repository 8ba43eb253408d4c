"""tools/pack_shards.py: a data set as .zst files for a journey, and back, byte for byte.

Exit codes: 0 done; 2 a mistake that the message explains; 130 interrupted, nothing left behind;
anything else is a crash.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mamba_dist.commands.arguments import positive_int
from mamba_dist.data.archive import (
    LEVELS,
    dataset_files,
    pack_dataset,
    read_packed,
    unpack_dataset,
)
from mamba_dist.data.manifest import read_manifest
from mamba_dist.errors import MambaDistError
from mamba_dist.telemetry.progress import progress

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"interrupted; nothing was left in {arguments.output}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _pack(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.dataset
    names = dataset_files(read_manifest(folder))
    total = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    begun_at = time.monotonic()
    with progress(total, "B", description="packing") as bar:
        packed = pack_dataset(
            folder,
            arguments.output,
            level=arguments.level,
            threads=arguments.threads,
            advance=bar.advance,
        )
    print(
        f"{arguments.output}: {len(packed.files)} files, {packed.bytes / 1e6:.1f} MB as "
        f"{packed.packed_bytes / 1e6:.1f} MB ({100 * packed.packed_bytes / packed.bytes:.0f} %), "
        f"{_speed(packed.bytes, begun_at)}"
    )


def _unpack(arguments: argparse.Namespace) -> None:
    index = read_packed(arguments.packed)
    begun_at = time.monotonic()
    with progress(index.bytes, "B", description="unpacking") as bar:
        unpack_dataset(arguments.packed, arguments.output, index=index, advance=bar.advance)
    print(
        f"{arguments.output}: {len(index.files)} files, {index.bytes / 1e6:.1f} MB, every hash "
        f"compared, {_speed(index.bytes, begun_at)}"
    )


def _speed(size_bytes: int, begun_at: float) -> str:
    return f"{size_bytes / 1e6 / max(time.monotonic() - begun_at, 1e-9):.0f} MB/s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/pack_shards.py",
        description="Pack a data set for a journey, and unpack it; every hash is compared on both "
        "ways, and the new folder appears only when it is whole.",
    )
    actions = parser.add_subparsers(required=True, metavar="{pack,unpack}")
    pack = actions.add_parser("pack", help="DATASET to a folder of .zst files")
    pack.add_argument("dataset", type=Path, help="data set folder")
    pack.add_argument("output", type=Path, metavar="OUT", help="new folder")
    pack.add_argument(
        "--level",
        type=int,
        choices=LEVELS,
        default=3,
        metavar="N",
        help=f"zstd level, {LEVELS.start} (quick) to {LEVELS.stop - 1} (small); default 3",
    )
    pack.add_argument(
        "--threads",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        help="threads that compress; default: all processors",
    )
    pack.set_defaults(run=_pack)
    unpack = actions.add_parser("unpack", help="such a folder back to a data set")
    unpack.add_argument("packed", type=Path, help="folder written by pack")
    unpack.add_argument("output", type=Path, metavar="OUT", help="new folder")
    unpack.set_defaults(run=_unpack)
    return parser
