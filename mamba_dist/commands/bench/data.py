"""bench data: tokenising, ours beside the libraries alone and beside others' ways of working.

Each turn of a variant is a fresh process with one worker; the variants take turns. The figure is
megabytes of UTF-8 text per second of CPU time, user and system, of all the variant's processes:
what a cluster pays, and what does not depend on how busy the machine is. Ours are counted whole,
from the start of Python to the last fsync, the proof of parity included; the libraries and the
peers without their imports. The slow ones get a part of the corpus, evenly chosen documents, as
long as --slow-mb: all that are compared with the reference get the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.data_report import Runs, Turn, document, heading, table
from mamba_dist.commands.bench.data_worker import HF_MAP, MEGATRON, RAW
from mamba_dist.config.text import write_text
from mamba_dist.data.manifest import read_manifest
from mamba_dist.data.preparation.documents import BadDocument, read_documents
from mamba_dist.data.preparation.fast_backends import FAST_BACKENDS, REFERENCE
from mamba_dist.data.preparation.sampling import sample_texts
from mamba_dist.data.preparation.sources import DiscoveryOptions, InputFile, discover
from mamba_dist.data.tokenization import save_tokenizer, train_bpe
from mamba_dist.errors import DataError

OURS: Final = (REFERENCE, *FAST_BACKENDS)
VARIANTS: Final = (*OURS, *(RAW + name for name in OURS), HF_MAP, MEGATRON)
_FAST: Final = (*FAST_BACKENDS, *(RAW + name for name in FAST_BACKENDS))
_VOCAB_SIZE: Final = 8192
_TRAINED_ON_BYTES: Final = 4 << 20
_LAST_WORDS: Final = 3
TOKENIZE: Final = "from mamba_dist.commands.tokenize import main; raise SystemExit(main())"
"""Python's program, since a script has no place in an installed package."""
_ONE_THREAD: Final = ("env", "TOKENIZERS_PARALLELISM=false", "RAYON_NUM_THREADS=1")


@dataclass(frozen=True)
class _Corpus:
    """One file of JSON lines, and the bytes of its texts."""

    path: Path
    text_bytes: int
    documents: int


@dataclass(frozen=True)
class _Inputs:
    """What the variants read, by whether they are slow."""

    whole: _Corpus
    part: _Corpus
    tokenizer: Path

    def of(self, variant: str) -> _Corpus:
        return self.whole if variant in _FAST else self.part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--corpus",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="files and folders of text; default Python's own standard library",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help=f"a tokenizer.json; default a BPE of {_VOCAB_SIZE} ids trained on the corpus",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="default 3")
    parser.add_argument(
        "--slow-mb",
        type=positive_int,
        default=32,
        metavar="MB",
        help="how much text the slow variants get; default 32",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        help=f"of {', '.join(VARIANTS)}; default all",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments."""
    unknown = sorted(set(arguments.variants or ()) - set(VARIANTS))
    if unknown:
        return f"--variants: {', '.join(unknown)} unknown here, expected {', '.join(VARIANTS)}"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Prints the table; whether every variant of ours gave the reference's ids.

    Raises:
        DataError: the corpus or the tokenizer cannot be read.
    """
    print(heading(words), flush=True)
    with TemporaryDirectory(prefix="mamba-dist-bench-") as name:
        folder = Path(name)
        inputs = _prepare(arguments, folder)
        chosen = [v for v in VARIANTS if arguments.variants is None or v in arguments.variants]
        found = Runs({v: (inputs.of(v).text_bytes, inputs.of(v).documents) for v in chosen})
        for number in range(1, arguments.rounds + 1):
            for variant in chosen:
                if variant not in found.absent:
                    turn = _turn(variant, inputs, folder / f"{variant}-{number}")
                    found.add(variant, turn)
                    print(f"[{number}/{arguments.rounds}] {variant}: {turn}", file=sys.stderr)
    print(table(found), flush=True)
    if arguments.json is not None:
        write_text(json.dumps(document(words, found), indent=2) + "\n", arguments.json)
    return bool(found.turns) and not found.wrong


def _prepare(arguments: argparse.Namespace, folder: Path) -> _Inputs:
    roots = arguments.corpus or [Path(sysconfig.get_path("stdlib"))]
    files = discover(roots, DiscoveryOptions(exclude=("site-packages", "dist-packages"))).files
    whole = _write(folder / "whole.jsonl", corpus_texts(files), keep=1.0)
    share = arguments.slow_mb * 1e6 / whole.text_bytes
    part = _write(folder / "part.jsonl", corpus_texts(files), keep=share) if share < 1 else whole
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        texts = sample_texts(
            files,
            text_field="text",
            sample_bytes=_TRAINED_ON_BYTES,
            total_bytes=whole.text_bytes,
        )
        save_tokenizer(tokenizer, train_bpe(texts, vocab_size=_VOCAB_SIZE))
    return _Inputs(whole, part, tokenizer)


def corpus_texts(files: Sequence[InputFile]) -> Iterator[str]:
    """The texts of all good documents."""
    for file in files:
        for found in read_documents(file, "text"):
            if not isinstance(found, BadDocument):
                yield "".join(found.texts())


def _write(path: Path, texts: Iterator[str], *, keep: float) -> _Corpus:
    """The texts as JSON lines; of all of them, or of a share evenly spread over them."""
    size = documents = 0
    due = 0.0
    with path.open("w", encoding="utf-8") as lines:
        for text in texts:
            due += keep
            if due < 1 and keep < 1:
                continue
            due -= 1
            lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            documents += 1
    if documents == 0:
        raise DataError(f"--corpus: no text for {path.name}; give more of it")
    return _Corpus(path, size, documents)


def _turn(variant: str, inputs: _Inputs, folder: Path) -> Turn | str:
    folder.mkdir()
    corpus = inputs.of(variant)
    if variant in OURS:
        options = ["--tokenizer", str(inputs.tokenizer), "--output", str(folder / "set")]
        options += ["--backend", variant, "--workers", "1"]
        words = ["-c", TOKENIZE, str(corpus.path), *options]
    else:
        paths = map(str, (corpus.path, inputs.tokenizer, folder))
        words = ["-m", f"{__package__}.data_worker", variant, *paths]
    begun_at, before = time.monotonic(), _children_cpu_s()
    done = subprocess.run(
        [*_ONE_THREAD, sys.executable, *words], capture_output=True, text=True, check=False
    )
    wall_s, cpu_s = time.monotonic() - begun_at, _children_cpu_s() - before
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()][-_LAST_WORDS:]
        return " / ".join(said) or f"ended with {done.returncode}"
    if variant in OURS:
        made = read_manifest(folder / "set")
        tokens = sum(shard.tokens for shard in made.shards) - made.inputs.documents
        return Turn(cpu_s, wall_s, tokens)
    said_last = json.loads(done.stdout.splitlines()[-1])
    if "absent" in said_last:
        return str(said_last["absent"])
    return Turn(float(said_last["cpu_s"]), wall_s, int(said_last["tokens"]))


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
