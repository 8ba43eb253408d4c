"""A corpus of a few megabytes and a tokenizer that is quick with it."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

_WORDS = "state space model scans the long text and forgets nothing".split()  # noqa: SIM905


def write_corpus(folder: Path, *, files: int) -> Path:
    """`files` files of 2,500 documents and 1.5 MB: as many units at least."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(files):
        lines = [
            json.dumps({"text": f"{number} {line} " + " ".join(rng.choices(_WORDS, k=100))})
            for line in range(2500)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def write_tokenizer(path: Path) -> Path:
    """A tokenizer.json of whole words."""
    vocabulary = {word: number for number, word in enumerate(["?", "<eos>", *_WORDS])}
    words = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.save(str(path))
    return path


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
