"""What of a corpus is read, and how, on a command line."""

import argparse
import sys
from pathlib import Path

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.data.manifest import DEFAULT_MAX_RECORD_BYTES
from mamba_dist.data.preparation.build import DEFAULT_MAX_BAD
from mamba_dist.data.preparation.sources import Corpus, DiscoveryOptions, InputFile, discover
from mamba_dist.data.preparation.standard_input import keep_standard_input
from mamba_dist.data.tokenization import load_tokenizer
from mamba_dist.errors import DataError

STANDARD_INPUT = "-"


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What of the corpus is read, and how."""
    parser.add_argument(
        "--text-field", default="text", help="field or column that holds the text; default text"
    )
    parser.add_argument(
        "--id-field",
        metavar="FIELD",
        help="field or column that holds the document's id, to be kept in document_ids.arrow and "
        "shown by tools/which_docs.py",
    )
    parser.add_argument(
        "--stdin-format",
        choices=("jsonl", "text"),
        default="jsonl",
        help="what - is: JSON lines, or the text of one document; plain or as .zst .gz .xz; "
        "default jsonl",
    )
    parser.add_argument(
        "--max-record-bytes",
        type=positive_int,
        default=DEFAULT_MAX_RECORD_BYTES,
        metavar="N",
        help="a JSON line or table cell over this is a bad document, as is a text with a sixteenth "
        "of it without a place to cut; workers take several times as much memory; default "
        f"{DEFAULT_MAX_RECORD_BYTES}",
    )
    parser.add_argument(
        "--train-split", type=_share, help="share of documents for training; the others validate"
    )
    parser.add_argument("--extensions", help="read only these, as in .txt,.log")
    add_exclude(parser)
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="of documents with the very same text take the first; needs 20 bytes of memory a "
        "document",
    )
    parser.add_argument("--eos", metavar="TOKEN", help="token that ends a document")
    parser.add_argument(
        "--max-bad",
        type=not_negative_int,
        default=DEFAULT_MAX_BAD,
        metavar="N",
        help="stop after more than N bad documents (not UTF-8, broken JSON, no text field, too "
        f"long); default {DEFAULT_MAX_BAD}",
    )


def add_exclude(parser: argparse.ArgumentParser) -> None:
    """What of a corpus is left out."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave out files and folders of this name or path below the corpus; may be repeated",
    )


def find_corpus(arguments: argparse.Namespace, *, output: Path, tokenizer: Path | None) -> Corpus:
    """The corpus that a parsed command line names, for an output folder that is no part of it.

    Raises:
        DataError: see `discover` and `keep_standard_input`.
    """
    names: list[str] = arguments.corpus
    roots: list[Path | InputFile] = [Path(name) for name in names if name != STANDARD_INPUT]
    if STANDARD_INPUT in names:
        if tokenizer is not None:  # before a long stream is read in vain
            load_tokenizer(tokenizer, eos_token=arguments.eos)
        if sys.stdin is None:
            raise DataError("standard input is closed; pipe text into it, or leave out -")
        kept = keep_standard_input(
            sys.stdin.buffer,
            output,
            content=arguments.stdin_format,
            overwrite=arguments.overwrite,
        )
        roots.insert(names.index(STANDARD_INPUT), kept)
    skip = (output, *([tokenizer] if tokenizer else []))
    options = DiscoveryOptions(_extensions(arguments.extensions), tuple(arguments.exclude), skip)
    return discover(roots, options)


def _extensions(given: str | None) -> frozenset[str] | None:
    if given is None:
        return None
    names = [name.strip().lower() for name in given.split(",") if name.strip()]
    return frozenset(name if name.startswith(".") else f".{name}" for name in names)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
