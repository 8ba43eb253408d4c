"""tools/plan_packing.py: makes the plan that data.packing best_fit and pad need, or compares modes.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mamba_dist.commands.arguments import positive_int
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import DataConfig, Packing
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import Manifest
from mamba_dist.data.packing_plan import plan_key, plan_path
from mamba_dist.data.planning import make_plan, packing_totals
from mamba_dist.errors import DataError, MambaDistError
from mamba_dist.telemetry.progress import progress

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.config is None and not (arguments.dataset and arguments.sequence_length):
        parser.error("give --config, or the data set's folder and --sequence-length")
    try:
        _run(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _run(arguments: argparse.Namespace) -> None:
    data = DataConfig() if arguments.config is None else load_config(arguments.config).config.data
    folders = [arguments.dataset] if arguments.dataset else [s.path for s in data.all_sources]
    length: int = arguments.sequence_length or data.sequence_length
    packing: Packing = arguments.packing or data.packing
    if packing == "concat" and not arguments.compare:
        raise DataError(
            "packing concat needs no plan: its sequences are windows of the stream; give --packing "
            "best_fit or pad, or set data.packing in the config"
        )
    for folder in map(Path, folders):
        manifest = open_dataset(folder).manifest
        if arguments.compare:
            _compare(folder, manifest, length)
        else:
            _plan(folder, manifest, packing, length)


def _plan(folder: Path, manifest: Manifest, packing: Packing, length: int) -> None:
    begun_at = time.monotonic()
    with progress(manifest.tokens("train"), "tokens", description="planning") as bar:
        totals = make_plan(folder, manifest, packing=packing, length=length, advance=bar.advance)
    path = plan_path(folder, plan_key(manifest.fingerprint, packing, length))
    print(
        f"{path}: {totals.samples:,} sequences of {length:,} for {totals.documents:,} documents, "
        f"{path.stat().st_size / 1e6:,.1f} MB in {time.monotonic() - begun_at:.1f} s"
    )
    print(
        f"{100 * totals.unlabelled_share(length):.3f} % of the positions are padding; "
        f"{100 * totals.cut_share:.2f} % of the documents are longer and cut"
    )


def _compare(folder: Path, manifest: Manifest, length: int) -> None:
    print(
        f"{folder}, split train: {manifest.documents('train'):,} documents, "
        f"{manifest.tokens('train'):,} tokens, sequences of {length:,}"
    )
    print(f"{'packing':<10}{'sequences':>14}{'unlabelled':>14}{'documents cut':>16}")
    for packing in get_args(Packing):
        with progress(manifest.tokens("train"), "tokens", description=packing) as bar:
            totals = packing_totals(
                folder, manifest, packing=packing, length=length, advance=bar.advance
            )
        unlabelled, cut = 100 * totals.unlabelled_share(length), 100 * totals.cut_share
        print(f"{packing:<10}{totals.samples:>14,}{unlabelled:>12.3f} %{cut:>14.2f} %")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan_packing.py",
        description="Plan which documents of the training split share a sequence. The plan is a "
        "file in the data set's folder; training with data.packing best_fit or pad reads it.",
    )
    parser.add_argument("dataset", nargs="?", help="data set folder; default: all of the config's")
    parser.add_argument("--config", type=Path, help="the run's config")
    parser.add_argument("--packing", choices=get_args(Packing)[1:], help="default: the config's")
    parser.add_argument(
        "--sequence-length", type=positive_int, metavar="L", help="default: the config's"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="print what each mode costs at this length, and write nothing; unlabelled positions "
        "are padding, or in concat the last token of each document",
    )
    return parser
