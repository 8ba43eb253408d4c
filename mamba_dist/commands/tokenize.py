"""data_prep/tokenize.py: turns a corpus into a data set of token shards.

Exit codes: 0 done, or already complete; 2 a mistake that the message explains; anything else is a
crash.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.corpus_arguments import STANDARD_INPUT, add_reading, find_corpus
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import DataConfig, RunConfig
from mamba_dist.data.preparation.build import (
    BuildRequest,
    BuildResult,
    ShareResult,
    build_dataset,
    build_share,
)
from mamba_dist.data.preparation.fast_backends import AUTO, FAST_BACKENDS, INSTALL, REFERENCE
from mamba_dist.data.preparation.folder_walk import glob_folder
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.share import Share, parse_share
from mamba_dist.data.preparation.sources import Corpus, Unit
from mamba_dist.data.preparation.standard_input import NAME as STANDARD_INPUT_NAME
from mamba_dist.data.shard_index import SPLITS
from mamba_dist.data.tokenization import load_tokenizer
from mamba_dist.errors import ConfigError, DataError, MambaDistError
from mamba_dist.telemetry.progress import Progress, progress

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
DEFAULT_VOCAB_SIZE = 8192
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8; standard error says them so already.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


@dataclass(frozen=True)
class _TokenizerChoice:
    path: Path | None
    train_vocab_size: int | None
    reason: str


class _Console:
    """Shows a build on the terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._begun_at = time.monotonic()
        self._documents = 0
        self._text_bytes = 0

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        if done_bytes:
            self.notice(f"continuing: {done_bytes / 1e6:.1f} MB were done by an earlier run")
        self._begun_at = time.monotonic()
        self.close()
        self._bar = progress(total_bytes, "B", description="tokenizing", initial=done_bytes)

    def advanced(self, unit: Unit, record: PartRecord) -> None:
        assert self._bar is not None
        self._bar.advance(unit.bytes)
        self._documents += record.documents
        self._text_bytes += record.text_bytes

    def notice(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def speed(self) -> str:
        seconds = max(time.monotonic() - self._begun_at, 1e-9)
        return (
            f"{self._documents:,} documents in {seconds:.1f} s: {self._documents / seconds:,.0f} "
            f"documents/s, {self._text_bytes / 1e6 / seconds:.1f} MB/s"
        )


def _run(arguments: argparse.Namespace) -> None:
    config = _load(arguments.config)
    roots = [Path(root) for root in arguments.corpus if root != STANDARD_INPUT]
    output = _choose_output(arguments, config, roots)
    choice = _choose_tokenizer(arguments, config, roots)
    if arguments.task is not None and STANDARD_INPUT in arguments.corpus:
        raise DataError(
            "several tasks cannot share one standard input; write it to a file that all see, and "
            "give that"
        )
    corpus = find_corpus(arguments, output=output, tokenizer=choice.path)
    request = _request(arguments, config, output=output, corpus=corpus, choice=choice)
    if config is not None:
        _check_model(arguments, config, choice)
    _print_choices(request, choice)
    console = _Console()
    if arguments.task is not None:
        share = parse_share(arguments.task)
        with contextlib.closing(console):
            made = build_share(request, share, console)
        _print_share(request, share, made, console)
        return
    with contextlib.closing(console):
        result = build_dataset(request, console)
    _print_result(request, result, console)


def _load(path: str | None) -> RunConfig | None:
    if path is None:
        return None
    loaded = load_config(path, [])
    for line in loaded.account:
        print(line)
    return loaded.config


def _check_model(
    arguments: argparse.Namespace, config: RunConfig, choice: _TokenizerChoice
) -> None:
    """Nothing, if the config's model embeds every id of the tokenizer."""
    if choice.path is not None:
        ids = load_tokenizer(choice.path, eos_token=arguments.eos).vocab_size
    else:
        ids = choice.train_vocab_size or 0
    if ids > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {choice.path or 'to be trained'} has {ids} ids, model.vocab_size of "
            f"{arguments.config} is {config.model.vocab_size}; set it to at least {ids}, or give "
            "another tokenizer"
        )


def _request(
    arguments: argparse.Namespace,
    config: RunConfig | None,
    *,
    output: Path,
    corpus: Corpus,
    choice: _TokenizerChoice,
) -> BuildRequest:
    data = config.data if config else DataConfig()
    train, val = data.train_split, data.val_split
    if arguments.train_split is not None:
        train, val = arguments.train_split, round(1 - arguments.train_split, 12)
    return BuildRequest(
        output=output,
        corpus=corpus,
        tokenizer=choice.path,
        train_vocab_size=choice.train_vocab_size,
        train_split=train,
        val_split=val,
        eos_token=arguments.eos,
        text_field=arguments.text_field,
        workers=arguments.workers,
        batch_documents=data.tokenize_batch_documents,
        max_bad=arguments.max_bad,
        overwrite=arguments.overwrite,
        merge_only=arguments.merge,
        deduplicate=arguments.deduplicate,
        backend=arguments.backend,
        max_record_bytes=arguments.max_record_bytes,
        id_field=arguments.id_field,
    )


def _choose_output(
    arguments: argparse.Namespace, config: RunConfig | None, roots: list[Path]
) -> Path:
    if arguments.output is not None:
        return Path(arguments.output)
    if config is not None:
        if config.data.dataset_path is None:
            raise ConfigError("the config has data.sources and no data.dataset_path; give --output")
        return Path(config.data.dataset_path)
    if arguments.corpus[0] == STANDARD_INPUT:
        return Path("data") / STANDARD_INPUT_NAME
    root = roots[0] if os.path.exists(roots[0]) else glob_folder(roots[0])
    first = Path(os.path.realpath(root))
    return Path("data") / (first.name if first.is_dir() else first.name.split(".")[0])


def _choose_tokenizer(
    arguments: argparse.Namespace, config: RunConfig | None, roots: list[Path]
) -> _TokenizerChoice:
    if arguments.train_bpe is not None:
        return _TokenizerChoice(None, arguments.train_bpe, "--train-bpe")
    if arguments.tokenizer is not None:
        return _TokenizerChoice(Path(arguments.tokenizer), None, "--tokenizer")
    if config is not None:
        path = Path(config.data.tokenizer_path)
        if not path.is_file():
            raise DataError(
                f"tokenizer {path} (data.tokenizer_path of {arguments.config}) does not exist; "
                f"train it by `python tools/train_tokenizer.py {_named(roots)} --vocab-size "
                f"{config.model.vocab_size} --output {path}`, or give one by --tokenizer"
            )
        return _TokenizerChoice(path, None, f"data.tokenizer_path of {arguments.config}")
    folders = [root for root in roots if root.is_dir()]
    for folder in (*folders, Path()):
        for name in _TOKENIZER_NAMES:
            if (folder / name).is_file():
                return _TokenizerChoice(folder / name, None, "found there")
    reason = "none given, none found beside the corpus or here"
    return _TokenizerChoice(None, DEFAULT_VOCAB_SIZE, reason)


def _named(roots: list[Path]) -> str:
    return str(roots[0]) if roots else "CORPUS"


def _print_choices(request: BuildRequest, choice: _TokenizerChoice) -> None:
    corpus = request.corpus
    duplicates = f", {corpus.duplicates} symbolic duplicates left out" * bool(corpus.duplicates)
    if choice.path is not None:
        tokenizer = f"{choice.path} ({choice.reason})"
    else:
        tokenizer = (
            f"a new byte-level BPE of {choice.train_vocab_size} ids, trained on the corpus into "
            f"{request.output / 'tokenizer.json'} ({choice.reason})"
        )
    print(f"corpus     {len(corpus.files):,} files, {corpus.bytes / 1e6:.1f} MB{duplicates}")
    if corpus.ignored_extensions:
        count = sum(number for _, number in corpus.ignored_extensions)
        kinds = ", ".join(f"{number} {name}" for name, number in corpus.ignored_extensions[:5])
        print(f"           {count:,} files of other kinds left out ({kinds}); see --extensions")
    print(f"tokenizer  {tokenizer}")
    print(f"output     {request.output}")
    print(f"splits     train {request.train_split:g}, val {request.val_split:g}")
    print(f"workers    {request.workers}", flush=True)


def _print_share(request: BuildRequest, share: Share, made: ShareResult, console: _Console) -> None:
    if made.was_complete:
        print(f"{request.output} is already complete, made from the same inputs; nothing to do")
        return
    print(console.speed())
    print(
        f"task {share}: its {made.units:,} units are made; once those of all {share.count} tasks "
        "are, the same command with --merge instead of --task makes the data set of them"
    )


def _print_result(request: BuildRequest, result: BuildResult, console: _Console) -> None:
    manifest = result.manifest
    if result.was_complete:
        print(f"{request.output} is already complete, made from the same inputs; nothing to do")
    else:
        print(console.speed())
    for split in SPLITS:
        shards = manifest.shards_of(split)
        print(
            f"{split:<5}  {manifest.documents(split):>12,} documents {manifest.tokens(split):>16,} "
            f"tokens {len(shards):>5} shards {sum(s.bytes for s in shards) / 1e6:>10.1f} MB"
        )
    if manifest.duplicates is not None:
        print(
            f"{manifest.duplicates.documents:,} duplicates left out, "
            f"{manifest.duplicates.text_bytes / 1e6:.1f} MB of text"
        )
    bad = manifest.inputs.bad_documents
    if bad:
        print(
            f"{bad} documents passed over (empty or bad), listed in "
            f"{request.output / 'bad_documents.jsonl'}"
        )
    vocabulary = manifest.tokenizer
    print(
        f"tokenizer  {request.output / vocabulary.file}: {vocabulary.vocab_size:,} ids, documents "
        f"end with {vocabulary.eos_token} (id {vocabulary.eos_id}); model.vocab_size must be "
        "at least that"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="data_prep/tokenize.py",
        description="Turn text into a data set of token shards. The same command again continues "
        "after an interruption; the result does not depend on it, nor on the number of workers.",
    )
    parser.add_argument(
        "corpus",
        nargs="+",
        help="files, folders and quoted globs of text; - for standard input, which is kept in the "
        "output folder until the data set is finished",
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json or SentencePiece .model; default: the config's, or one of these names "
        "in the corpus or here, or a new one trained on the corpus",
    )
    parser.add_argument(
        "--train-bpe",
        type=positive_int,
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE tokenizer on the corpus",
    )
    parser.add_argument("--output", help="data set folder; default: the config's, or data/<corpus>")
    parser.add_argument(
        "--config", help="take what is not given here from the data section of this file"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=_processors(),
        help="processes; default: all processors",
    )
    parser.add_argument(
        "--backend",
        choices=(AUTO, REFERENCE, *FAST_BACKENDS),
        default=AUTO,
        help="what encodes; never changes an id. auto, the default: a fast one if it is installed "
        f"({INSTALL}) and proven equal to the reference on this corpus and on adversarial texts",
    )
    add_reading(parser)
    _add_doing(parser)
    return parser


def _add_doing(parser: argparse.ArgumentParser) -> None:
    """What is to be done, if not the whole."""
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument(
        "--task",
        metavar="I/N",
        help="make only every N-th piece of the data set, from the I-th (0 to N-1) on, beside "
        "tasks on other machines that share the output folder; see launch/slurm/tokenize.sbatch",
    )
    doing.add_argument(
        "--merge",
        action="store_true",
        help="make the data set of what tasks have made, or say which of them to run again",
    )
    doing.add_argument(
        "--overwrite", action="store_true", help="replace what the output folder holds"
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0))
