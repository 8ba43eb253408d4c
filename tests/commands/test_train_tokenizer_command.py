import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_dist.commands.train_tokenizer import main
from mamba_dist.data.tokenization import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "corpus"
    (folder / "skipped").mkdir(parents=True)
    rng = random.Random(0)
    for number in range(60):
        letters = ("".join(rng.choices("abcdefgh", k=5)) for _ in range(2000))
        (folder / f"{number:02}.txt").write_text(" ".join(letters))
    (folder / "skipped" / "x.txt").write_text("zzzz zzzz zzzz " * 5000)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def test_the_same_corpus_gives_the_same_file(corpus: Path, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        options = ["--vocab-size", "400", "--output", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(corpus), *options], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one.json")
    assert (tokenizer.vocab_size, tokenizer.eos_token, tokenizer.eos_id) == (
        400,
        "<|endoftext|>",
        0,
    )
    assert "400 ids, <|endoftext|> is id 0" in done.stdout


def test_special_tokens_and_exclusion_act(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.json"
    options = ["--vocab-size", "300", "--output", str(path), "--exclude", "skipped"]
    for token in ("<|user|>", "<|endoftext|>", "<|bot|>"):
        options += ["--special-token", token]
    assert main([str(corpus), *options]) == 0
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    assert list(vocabulary)[:3] == ["<|endoftext|>", "<|user|>", "<|bot|>"]
    assert "zz" not in vocabulary


def test_a_sample_is_a_part_of_the_corpus_and_always_the_same(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    big = tmp_path / "big"
    big.mkdir()
    for copy in range(4):
        for path in corpus.glob("[0-9]*.txt"):
            text = path.read_text()
            (big / f"{copy}-{path.name}").write_text(text.replace("a", "stuvwx"[copy]) * 2)
    contents = []
    for sample in (10**6, 10**6, 2 * 10**8):
        path = tmp_path / "t.json"
        options = ["--vocab-size", "500", "--sample-bytes", str(sample), "--output", str(path)]
        assert main([str(big), *options]) == 0
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert "training on about 1 MB" in capsys.readouterr().out


def test_a_corpus_that_has_too_little_to_merge_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    options = ["--vocab-size", "5000", "--output", str(tmp_path / "t.json")]
    assert main([str(tmp_path / "a.txt"), *options]) == 0
    assert "fewer than the 5,000 asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{corpus}", "--vocab-size", "256", "--output", "{tmp}/t.json"], "is too small"),
        (["{corpus}", "--vocab-size", "300", "--output", "{tmp}/t.model"], "does not end in .json"),
        (["{tmp}", "--vocab-size", "300", "--output", "{tmp}/t.json"], "no files found in"),
        (
            ["{corpus}/empty.txt", "--vocab-size", "300", "--output", "{tmp}/t.json"],
            "no text to train",
        ),
        (["{corpus}/no.txt", "--vocab-size", "300", "--output", "{tmp}/t.json"], "does not exist"),
    ],
)
def test_every_mistake_is_one_clear_line_and_leaves_no_file(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert main([argument.format(corpus=corpus, tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
