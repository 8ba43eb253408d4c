"""tools/train_tokenizer.py: trains a byte-level BPE tokenizer on a corpus.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.corpus_arguments import add_exclude
from mamba_dist.data.preparation.sampling import sample_texts
from mamba_dist.data.preparation.sources import DiscoveryOptions, discover
from mamba_dist.data.tokenization import (
    END_OF_TEXT,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from mamba_dist.errors import DataError, MambaDistError

EXIT_USER_ERROR = 2
DEFAULT_SAMPLE_BYTES = 200_000_000


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
    output = Path(arguments.output)
    if output.suffix != ".json":
        raise DataError(
            f"--output {output} does not end in .json; expected a name such as tokenizer.json"
        )
    options = DiscoveryOptions(exclude=tuple(arguments.exclude), skip=(output,))
    corpus = discover([Path(root) for root in arguments.corpus], options)
    sample_bytes: int = arguments.sample_bytes
    print(
        f"corpus     {len(corpus.files):,} files, {corpus.bytes / 1e6:.1f} MB; training on "
        + (f"about {sample_bytes / 1e6:g} MB" if corpus.bytes > sample_bytes else "all of it"),
        flush=True,
    )
    begun_at = time.monotonic()
    texts = sample_texts(
        corpus.files,
        text_field=arguments.text_field,
        sample_bytes=sample_bytes,
        total_bytes=corpus.bytes,
    )
    special_tokens = list(dict.fromkeys([END_OF_TEXT, *arguments.special_token]))
    content = train_bpe(texts, vocab_size=arguments.vocab_size, special_tokens=special_tokens)
    save_tokenizer(output, content)
    tokenizer = load_tokenizer(output)
    print(
        f"tokenizer  {output}: {tokenizer.vocab_size:,} ids, {END_OF_TEXT} is id "
        f"{tokenizer.eos_id}, "
        f"trained in {time.monotonic() - begun_at:.1f} s"
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        print(
            f"           fewer than the {arguments.vocab_size:,} asked for: the corpus has no more "
            "pairs that repeat"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/train_tokenizer.py",
        description="Train a byte-level BPE tokenizer. The same corpus gives the same file.",
    )
    parser.add_argument("corpus", nargs="+", help="files, folders and quoted globs of text")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="ids, special tokens included"
    )
    parser.add_argument("--output", required=True, help="file to write, such as tokenizer.json")
    parser.add_argument(
        "--sample-bytes",
        type=positive_int,
        default=DEFAULT_SAMPLE_BYTES,
        metavar="N",
        help="train on documents that make up about so much of the corpus as it lies on disk, "
        f"chosen by their content, always the same; default {DEFAULT_SAMPLE_BYTES}",
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help=f"a control token beside {END_OF_TEXT}, which is always id 0; may be repeated, and "
        "the ids are in the order given",
    )
    add_exclude(parser)
    parser.add_argument(
        "--text-field", default="text", help="field or column that holds the text; default text"
    )
    return parser
