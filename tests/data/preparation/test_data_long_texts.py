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
    Cut,
    UncuttableError,
    cut_text,
    exact_cuts,
)
from mamba_dist.data.tokenization import END_OF_TEXT, load_tokenizer, train_bpe

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
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 150)
    rng = random.Random(name)
    texts = adversarial_texts((), decode=tokenizer.decode, ids=tokenizer.vocab_size)
    chosen = [*made_texts(500, seed=3), *rng.sample(texts, 500)]
    rng.shuffle(chosen)
    text = "".join(one + rng.choice([" ", "\n", "", "\r\n", "\n\n", ". "]) for one in chosen)
    pieces = list(cut_text([text], cuts, encoder=tokenizer, most_characters=len(text)))
    assert len(pieces) > 50 if cuts else pieces == [text]
    whole = tokenizer.encode_flat([text])[0]
    assert np.array_equal(tokenizer.encode_flat(pieces)[0], whole)


def test_an_entry_over_a_cut_is_seen_in_the_vocabulary(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.json", pre_tokenizers.Metaspace())
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["zq▁jx"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content), encoding="utf-8")
    assert exact_cuts(REFERENCE, str(path), eos_token=END_OF_TEXT) == ()


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(train_bpe(TEXTS, vocab_size=300))
    tokenizer.pre_tokenizer = byte_level(None)
    return tokenizer


def with_added_token() -> tokenizers.Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([tokenizers.AddedToken("York", normalized=False, rstrip=True)])
    return tokenizer


def with_replaced_words() -> tokenizers.Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Replace("new york", "nyc")
    return tokenizer


def with_replaced_pairs() -> tokenizers.Tokenizer:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Replace(tokenizers.Regex(r"\b(\w+) \1\b"), "twice")
    return tokenizer


def with_a_look_around(pattern: str) -> tokenizers.Tokenizer:
    tokenizer = byte_level_bpe()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (with_added_token, "a York b "),
        (with_replaced_words, "new york "),
        (with_replaced_pairs, "aa "),
        (lambda: with_a_look_around(r"(?<=[b-e]) (?=[b-e])"), "bb dd aa "),
    ],
    ids=["added token", "replaced words", "replaced pairs", "look-around"],
)
def test_a_place_that_this_tokenizer_minds_is_not_cut(
    tmp_path: Path,
    make: Callable[[], tokenizers.Tokenizer],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 1000)
    path = tmp_path / "tokenizer.json"
    make().save(str(path))
    tokenizer = load_tokenizer(path)
    cuts = exact_cuts(REFERENCE, str(path), eos_token=END_OF_TEXT)
    assert cuts == LINES, "the trial cannot know these words"
    for shift in range(len(text) * 2):
        # The usual place to cut falls at each character of the text in turn.
        shifted = "x" * shift + " " + text * (4000 // len(text))
        pieces = list(cut_text([shifted], cuts, encoder=tokenizer, most_characters=1 << 20))
        # Which words are a pair is counted from the very beginning: no window can tell.
        assert len(pieces) == 1 if make is with_replaced_pairs else len(pieces) >= 3
        whole = tokenizer.encode_flat([shifted])[0]
        assert np.array_equal(tokenizer.encode_flat(pieces)[0], whole)


def test_a_text_that_nowhere_can_be_cut_is_refused_beyond_the_limit(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Replace("aa", "b")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_tokenizer(tmp_path / "tokenizer.json")
    text = "a\nb" * LONG_CHARACTERS
    with pytest.raises(UncuttableError):
        list(cut_text([text], (Cut.AFTER_LINE,), encoder=encoder, most_characters=LONG_CHARACTERS))


@pytest.mark.parametrize("cuts", [LINES, (Cut.AT_SPACE,)])
def test_pieces_do_not_depend_on_how_the_text_arrives(
    cuts: tuple[Cut, ...], tokenizer_path: Path
) -> None:
    encoder = load_tokenizer(tokenizer_path)
    text = " ".join(made_texts(3000))
    most = len(text)
    expected = list(cut_text([text], cuts, encoder=encoder, most_characters=most))
    assert len(expected) >= 3 or cuts != LINES
    rng = random.Random(1)
    for _ in range(3):
        places = sorted(rng.sample(range(len(text)), 200))
        strings = [text[a:b] for a, b in zip([0, *places], [*places, None], strict=True)]
        assert list(cut_text(strings, cuts, encoder=encoder, most_characters=most)) == expected


def test_a_place_is_tried_with_all_that_stands_behind_it_however_the_text_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 1000)
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Replace("new york is", "nyc")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_tokenizer(tmp_path / "tokenizer.json")
    text = "new york is " * 1000
    expected = list(cut_text([text], LINES, encoder=encoder, most_characters=len(text)))
    assert {piece.strip()[:11] for piece in expected} == {"new york is"}
    for step in (1, 7, 300):
        strings = [text[at : at + step] for at in range(0, len(text), step)]
        pieces = cut_text(strings, LINES, encoder=encoder, most_characters=len(text))
        assert list(pieces) == expected


def test_a_text_without_a_place_to_cut_is_refused_beyond_the_limit(tokenizer_path: Path) -> None:
    encoder = load_tokenizer(tokenizer_path)
    text = "x" * (LONG_CHARACTERS + 1)
    assert list(cut_text([text], LINES, encoder=encoder, most_characters=len(text))) == [text]
    with pytest.raises(UncuttableError):
        list(cut_text([text], LINES, encoder=encoder, most_characters=LONG_CHARACTERS))


@pytest.mark.parametrize("block", [1 << 16, 1 << 30])
def test_a_stretch_without_a_place_takes_nothing_before_it_along(
    block: int, tokenizer_path: Path
) -> None:
    encoder = load_tokenizer(tokenizer_path)
    words, blob = "some words " * 15_000, "x" * (LONG_CHARACTERS - 10)
    text = f"{words}{blob} {words}{blob} {words}"
    strings = [text[at : at + block] for at in range(0, len(text), block)]
    pieces = list(cut_text(strings, LINES, encoder=encoder, most_characters=LONG_CHARACTERS))
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
