"""tools/inspect_data.py: what a split of a data set holds: counts, lengths, ids, samples.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.lookup import SplitIndex
from mamba_dist.data.manifest import Manifest
from mamba_dist.data.shard_index import SPLITS
from mamba_dist.data.statistics import SplitStatistics, sample_documents, split_statistics
from mamba_dist.data.tokenization import Tokenizer, check_tokenizer
from mamba_dist.errors import DataError, MambaDistError
from mamba_dist.telemetry.progress import progress

EXIT_USER_ERROR = 2
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_BAR_CHARACTERS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.histogram is not None:
        _require_matplotlib()
    folder, split = arguments.dataset, arguments.split
    manifest = open_dataset(folder).manifest
    tokenizer = check_tokenizer(manifest, folder / manifest.tokenizer.file)
    with progress(manifest.tokens(split), "tokens", description="counting") as bar:
        statistics = split_statistics(folder, manifest, split, advance=bar.advance)
    _print_counts(folder, manifest, split, statistics)
    _print_lengths(statistics)
    _print_ids(manifest, statistics, tokenizer, most=arguments.tokens)
    _print_samples(folder, manifest, tokenizer, arguments)
    if arguments.histogram is not None:
        _save_picture(arguments.histogram, statistics, title=f"{folder}, {split}")


def _print_counts(
    folder: Path, manifest: Manifest, split: str, statistics: SplitStatistics
) -> None:
    shards = manifest.shards_of(split)
    tokenizer = manifest.tokenizer
    print(f"{folder}, split {split}")
    print(f"  documents   {statistics.documents:>18,}")
    print(f"  tokens      {statistics.tokens:>18,}  {manifest.dtype}, each document's EOS included")
    print(f"  shards      {len(shards):>18,}")
    print(f"  bytes       {sum(shard.bytes for shard in shards):>18,}")
    inputs = manifest.inputs
    total = sum(manifest.tokens(each) for each in SPLITS)
    print(f"  text        {inputs.text_bytes / total:>18.2f}  bytes a token, over all splits")
    print(f"  tokenizer   {tokenizer.file}, {tokenizer.vocab_size:,} ids, {tokenizer.kind}")
    print(f"  made from   {inputs.files:,} files, {inputs.bad_documents:,} documents passed over")


def _print_lengths(statistics: SplitStatistics) -> None:
    print(f"\ntokens per document: mean {statistics.mean_length:,.1f}")
    quantiles = [(share, statistics.length_quantile(share)) for share in _QUANTILES]
    print("  " + "  ".join(f"{100 * share:g} %: {length:,}" for share, length in quantiles))
    histogram = statistics.length_histogram()
    highest = max(documents for _, _, documents in histogram)
    for begin, below, documents in histogram:
        bar = "#" * -(-documents * _BAR_CHARACTERS // highest)
        print(f"  {begin:>11,} to {below - 1:>11,}  {documents:>13,}  {bar}")


def _print_ids(
    manifest: Manifest, statistics: SplitStatistics, tokenizer: Tokenizer, *, most: int
) -> None:
    counts, vocabulary = statistics.id_counts, manifest.tokenizer
    eos = int(counts[vocabulary.eos_id])
    used = int((counts > 0).sum())
    print(
        f"\nEOS {vocabulary.eos_token} (id {vocabulary.eos_id}): {eos:,}, "
        f"{100 * eos / statistics.tokens:.3f} % of the tokens"
    )
    print(f"ids used: {used:,} of {len(counts):,}, {100 * used / len(counts):.1f} %")
    frequent = statistics.most_frequent(most)
    pieces = tokenizer.pieces([index for index, _ in frequent])
    print("most frequent:")
    for (index, count), piece in zip(frequent, pieces, strict=True):
        share = 100 * count / statistics.tokens
        # A byte-level piece is unreadable beyond ASCII, and a control token has no text.
        text = tokenizer.decode([index])
        print(f"  {index:>7}  {share:>7.3f} %  {count:>16,}  {text or piece!r:<16}  {piece}")


def _print_samples(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer, arguments: argparse.Namespace
) -> None:
    index = SplitIndex(folder, manifest, arguments.split)
    for number in sample_documents(
        manifest, arguments.split, arguments.samples, seed=arguments.seed
    ):
        place = index.nth(number)
        text = tokenizer.decode(index.read(place, most=arguments.sample_tokens).tolist())
        cut = " …" if place.tokens > arguments.sample_tokens else ""
        print(f"\n--- doc_id {place.doc_id}, {place.tokens:,} tokens, {place.shard}\n{text}{cut}")


def _require_matplotlib() -> None:
    try:
        import mamba_dist.telemetry.length_plot  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise DataError(
            "--histogram needs matplotlib, which is not installed: pip install 'mamba-dist[plot]' "
            "(in a checkout: pip install -e '.[plot]'); the histogram as text needs nothing"
        ) from error


def _save_picture(path: Path, statistics: SplitStatistics, *, title: str) -> None:
    from mamba_dist.telemetry.length_plot import save_length_plot

    try:
        save_length_plot(
            path,
            statistics.length_histogram(),
            title=title,
            median_tokens=statistics.length_quantile(0.5),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {path}: {error}") from error
    print(f"\nwrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/inspect_data.py",
        description="Count what a split of a data set holds, and show some of its documents.",
    )
    parser.add_argument("dataset", type=Path, help="data set folder")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default train")
    parser.add_argument(
        "--samples",
        type=not_negative_int,
        default=3,
        help="documents to show, drawn at random; default 3",
    )
    parser.add_argument(
        "--sample-tokens",
        type=positive_int,
        default=200,
        help="show at most so many tokens of each; default 200",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the samples; default 0")
    parser.add_argument(
        "--tokens", type=positive_int, default=20, help="most frequent tokens to list; default 20"
    )
    parser.add_argument(
        "--histogram",
        type=Path,
        metavar="PNG",
        help="also draw the lengths into this file; needs matplotlib (extra `plot`)",
    )
    return parser
