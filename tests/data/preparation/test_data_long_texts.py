import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from made_data import build, folder_bytes, made_texts
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import DuplicateSummary
from mamba_dist.data.preparation import long_texts
from mamba_dist.data.preparation.adversarial import adversarial_texts
from mamba_dist.data.preparation.fast_backends import REFERENCE
from mamba_dist.data.preparation.long_texts import (
    LONG_CHARACTERS,
    PIECE_CHARACTERS,
    Cut,
    UncuttableError,
    cut_text,
    exact_cuts,
)
from mamba_dist.data.tokenization import END_OF_TEXT, load_tokenizer

TEXTS = [" ".join(made_texts(20, seed=seed)) for seed in range(20)]
# The pattern of GPT-4 and later: signs take the line feeds behind them.
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pattern: str | None, *, prefix: bool = False) -> pre_tokenizers.PreTokenizer:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def train(
    path: Path,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    normalizer: normalizers.Normalizer | None = None,
    *,
    vocab_size: int = 500,
) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="?"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, "?"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


def train_sentencepiece(path: Path, kind: str, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return path.with_suffix(".model")


# As Llama's: white space stays as it is.
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LINES = (Cut.BEFORE_SPACE, Cut.AFTER_LINE)
MAKERS: dict[str, tuple[Callable[[Path], Path], tuple[Cut, ...]]] = {
    "gpt2": (lambda p: train(p, byte_level(None)), LINES),
    "gpt2 with a prefix": (lambda p: train(p, byte_level(None, prefix=True)), (Cut.AT_SPACE,)),
    "gpt4": (lambda p: train(p, byte_level(LATER)), LINES),
    "metaspace": (lambda p: train(p, pre_tokenizers.Metaspace()), (Cut.AT_SPACE,)),
    "sentencepiece bpe": (lambda p: train_sentencepiece(p, "bpe", **PLAIN), (Cut.AT_SPACE,)),
    "sentencepiece unigram": (
        lambda p: train_sentencepiece(p, "unigram"),
        (*LINES, Cut.AT_SPACE),
    ),
    "stripped ends": (lambda p: train(p, byte_level(None), normalizers.Strip()), ()),
    "no words": (lambda p: train(p, None), (Cut.AFTER_LINE,)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_pieces_of_a_long_text_have_the_ids_of_the_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = MAKERS[name]
    path = make(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(path)
    cuts = exact_cuts(REFERENCE, str(path), eos_token=tokenizer.eos_token)
    assert cuts == expected
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 50)
    rng = random.Random(name)
    texts = adversarial_texts((), decode=tokenizer.decode, ids=tokenizer.vocab_size)
    chosen = [*made_texts(500, seed=3), *rng.sample(texts, 500)]
    rng.shuffle(chosen)
    text = "".join(one + rng.choice([" ", "\n", "", "\r\n", "\n\n", ". "]) for one in chosen)
    pieces = list(cut_text([text], cuts, most_characters=len(text)))
    assert len(pieces) > 50 if cuts else pieces == [text]
    whole = tokenizer.encode_flat([text])[0]
    assert np.array_equal(tokenizer.encode_flat(pieces)[0], whole)


def test_an_entry_over_a_cut_is_seen_in_the_vocabulary(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.json", pre_tokenizers.Metaspace())
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["zq▁jx"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content), encoding="utf-8")
    assert exact_cuts(REFERENCE, str(path), eos_token=END_OF_TEXT) == ()


@pytest.mark.parametrize("cuts", [LINES, (Cut.AT_SPACE,)])
def test_pieces_do_not_depend_on_how_the_text_arrives(cuts: tuple[Cut, ...]) -> None:
    text = " ".join(made_texts(3000))
    expected = list(cut_text([text], cuts, most_characters=len(text)))
    assert len(expected) >= 3
    assert max(map(len, expected)) < PIECE_CHARACTERS + 1000
    rng = random.Random(1)
    for _ in range(3):
        places = sorted(rng.sample(range(len(text)), 200))
        strings = [text[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
        assert list(cut_text(strings, cuts, most_characters=len(text))) == expected


def test_a_text_without_a_place_to_cut_is_refused_beyond_the_limit() -> None:
    text = "x" * (LONG_CHARACTERS + 1)
    assert list(cut_text([text], LINES, most_characters=len(text))) == [text]
    with pytest.raises(UncuttableError):
        list(cut_text([text], LINES, most_characters=LONG_CHARACTERS))


@pytest.mark.parametrize("block", [1 << 16, 1 << 30])
def test_a_stretch_without_a_place_takes_nothing_before_it_along(block: int) -> None:
    words, blob = "some words " * 15_000, "x" * (LONG_CHARACTERS - 10)
    text = f"{words}{blob} {words}{blob} {words}"
    strings = [text[at : at + block] for at in range(0, len(text), block)]
    pieces = list(cut_text(strings, LINES, most_characters=LONG_CHARACTERS))
    assert "".join(pieces) == text
    assert f" {blob}" in pieces
    assert max(map(len, pieces)) <= LONG_CHARACTERS


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is long is short enough for a quick test."""
    monkeypatch.setattr("mamba_dist.data.preparation.documents._LONG_BYTES", 30_000)
    monkeypatch.setattr("mamba_dist.data.preparation.parts.LONG_CHARACTERS", 6_000)
    monkeypatch.setattr(long_texts, "LONG_CHARACTERS", 6_000)
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 3_000)


@pytest.mark.usefixtures("small_limits")
def test_long_documents_are_tokenised_as_the_whole_would_be(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    rng = random.Random(2)
    words = [word for text in made_texts(300) for word in text.split()]
    texts = {}
    # In memory whole, and not.
    for name, count in (("a.txt", 2_000), ("b.txt", 10_000)):
        texts[name] = "".join(rng.choice(words) + rng.choice(" \n") for _ in range(count))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in texts.items():
        (corpus / name).write_text(text, encoding="utf-8")
        (corpus / f"short-{name}").write_text(text[:200], encoding="utf-8")
    lines = (json.dumps({"text": text}) for text in (texts["a.txt"], *made_texts(30)))
    (corpus / "c.jsonl").write_text("\n".join(lines))
    build(corpus, tmp_path / "one", tokenizer_path, unit_bytes=1 << 21)
    build(corpus, tmp_path / "two", tokenizer_path, batch_documents=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    tokenizer = load_tokenizer(tokenizer_path)
    expected = [ids.tolist() for ids in tokenizer.encode_batch(list(texts.values()))]
    data = open_dataset(tmp_path / "one")
    found = []
    for split in (data.train, data.val):
        ids, begins = split.read(0, split.tokens)
        found += [part.tolist()[:-1] for part in np.split(ids, np.flatnonzero(begins)[1:])]
    assert found.count(expected[0]) == 2
    assert found.count(expected[1]) == 1


@pytest.mark.usefixtures("small_limits")
def test_a_long_text_is_known_again_however_it_was_read(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = " ".join(made_texts(200))
    assert len(text.encode()) > 30_000
    (corpus / "a.txt").write_text(text, encoding="utf-8")
    lines = (json.dumps({"text": one}) for one in (text, *made_texts(20, seed=1)))
    (corpus / "b.jsonl").write_text("\n".join(lines))
    result = build(corpus, tmp_path / "set", tokenizer_path, deduplicate=True)
    assert result.manifest.duplicates == DuplicateSummary(1, len(text.encode()))


@pytest.mark.usefixtures("small_limits")
def test_a_document_that_cannot_be_cut_is_bad_and_leaves_nothing(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(made_texts(30)):
        (corpus / f"{number:02}.txt").write_text(text)
    build(corpus, tmp_path / "without", tokenizer_path)
    blob = "start of it\n" * 4_000 + "QUJD" * 10_000
    (corpus / "05-blob.txt").write_text(blob)
    (corpus / "06-blob.txt").write_text(blob * 2)
    result = build(corpus, tmp_path / "with", tokenizer_path, max_record_bytes=16 * 8000)
    assert result.manifest.inputs.bad_documents == 2
    [line, _] = (tmp_path / "with" / "bad_documents.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "file": "corpus/05-blob.txt",
        "line": 1,
        "fault": "too long",
        "detail": "8,000 characters without a place where this tokenizer's ids allow a cut; see "
        "--max-record-bytes",
    }
    shards = folder_bytes(tmp_path / "without")
    for name, data in folder_bytes(tmp_path / "with").items():
        assert not name.endswith(".arrow") or data == shards[name]
