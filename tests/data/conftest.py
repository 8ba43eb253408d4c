"""One tokenizer and one corpus for all tests of this folder."""

from pathlib import Path

import pytest
from made_data import build, made_texts

from mamba_dist.data.tokenization import train_bpe


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe(made_texts(50, seed=9), vocab_size=350), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 text files in two folders, about 14 kB."""
    folder = tmp_path_factory.mktemp("made") / "corpus"
    for number, text in enumerate(made_texts(60)):
        path = folder / ("a", "b")[number % 2] / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, corpus_path: Path, tokenizer_path: Path
) -> Path:
    """The corpus tokenised by one worker without interruption."""
    output = tmp_path_factory.mktemp("finished") / "set"
    build(corpus_path, output, tokenizer_path)
    return output
