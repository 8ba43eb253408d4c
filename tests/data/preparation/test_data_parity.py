import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_data import SilentListener, build, folder_bytes, made_texts

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import BackendProof, Manifest, read_manifest, write_manifest
from mamba_dist.data.preparation import fast_backends, parity
from mamba_dist.data.preparation.adversarial import adversarial_texts
from mamba_dist.data.preparation.fast_backends import FAST_BACKENDS, load_encoder
from mamba_dist.data.preparation.parity import (
    BackendChoice,
    ParityError,
    choose_backend,
    sample_corpus,
)
from mamba_dist.data.preparation.sources import Corpus, DiscoveryOptions, discover
from mamba_dist.data.tokenization import FlatIds, Tokenizer, load_tokenizer
from mamba_dist.errors import DataError

# A module that every machine has stands for a fast library.
NAME = "json"
INSTALL = "pip install 'mamba-dist[fast]'"


class Planted:
    """The reference, but for the last id of texts that hold `wrong`."""

    def __init__(self, reference: Tokenizer, wrong: str | None) -> None:
        self._reference = reference
        self._wrong = wrong

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        ids, lengths = self._reference.encode_flat(texts)
        for text, end in zip(texts, lengths.cumsum(), strict=True):
            if self._wrong is not None and self._wrong in text:
                ids[end - 1] += 1
        return ids, lengths


@pytest.fixture
def corpus(corpus_path: Path) -> Corpus:
    return discover([corpus_path], DiscoveryOptions())


@pytest.fixture
def plant(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None], Tokenizer]:
    """Makes a backend that is wrong on the texts that hold a string the only fast one."""
    reference = load_tokenizer(tokenizer_path)

    def planted(wrong: str | None) -> Tokenizer:
        monkeypatch.setattr(parity, "LEAST_BYTES", 0)
        for name in list(FAST_BACKENDS):
            monkeypatch.delitem(FAST_BACKENDS, name)
        monkeypatch.setitem(FAST_BACKENDS, NAME, lambda module, content: Planted(reference, wrong))
        return reference

    return planted


def choose(wanted: str, path: Path, reference: Tokenizer, corpus: Corpus) -> BackendChoice:
    return choose_backend(wanted, path, reference=reference, corpus=corpus, text_field="text")


@pytest.mark.parametrize("wanted", ["auto", NAME])
def test_a_backend_that_gives_the_same_ids_is_proven_and_used(
    wanted: str, plant: Callable[..., Tokenizer], tokenizer_path: Path, corpus: Corpus
) -> None:
    choice = choose(wanted, tokenizer_path, plant(None), corpus)
    assert choice.name == NAME
    assert choice.proof is not None
    assert choice.proof.adversarial_texts > 5000
    assert choice.proof.corpus_documents == 60
    assert "ids equal to the reference's" in choice.reason


@pytest.mark.parametrize("wrong", ["0-17 ", "\u0301\u0301", "\r\n\r\n", "<|endoftext|>"])
def test_auto_refuses_a_backend_that_differs_anywhere_and_says_where(
    wrong: str, plant: Callable[..., Tokenizer], tokenizer_path: Path, corpus: Corpus
) -> None:
    choice = choose("auto", tokenizer_path, plant(wrong), corpus)
    assert choice.name == "reference"
    assert choice.proof is None
    assert f"{NAME} of unknown version does not tokenize as the reference does" in choice.reason
    assert ascii(wrong)[1:-1] in choice.reason
    assert "it makes from id " in choice.reason
    assert ", the reference [" in choice.reason


def test_a_backend_asked_for_by_name_that_differs_is_an_error(
    plant: Callable[..., Tokenizer], tokenizer_path: Path, corpus: Corpus
) -> None:
    with pytest.raises(ParityError, match=r"0-17 model .*the reference"):
        choose(NAME, tokenizer_path, plant("0-17 "), corpus)


def test_a_backend_that_is_not_installed_says_how_to_get_it(
    plant: Callable[..., Tokenizer],
    tokenizer_path: Path,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = plant(None)
    monkeypatch.setitem(FAST_BACKENDS, "no_such_library", FAST_BACKENDS[NAME])
    with pytest.raises(DataError, match=r"no_such_library cannot be imported .*mamba-dist"):
        choose("no_such_library", tokenizer_path, reference, corpus)
    monkeypatch.delitem(FAST_BACKENDS, NAME)
    choice = choose("auto", tokenizer_path, reference, corpus)
    assert (choice.name, INSTALL in choice.reason) == ("reference", True)


def test_a_tokenizer_that_a_backend_cannot_load_is_left_to_the_reference(
    plant: Callable[..., Tokenizer],
    tokenizer_path: Path,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(module: Any, content: str) -> Planted:
        raise ValueError("a model of another kind")

    reference = plant(None)
    monkeypatch.setitem(FAST_BACKENDS, NAME, fails)
    choice = choose("auto", tokenizer_path, reference, corpus)
    assert choice.name == "reference"
    assert "cannot load tokenizer.json (ValueError: a model of another kind)" in choice.reason
    with pytest.raises(DataError, match=r"not SentencePiece's t\.model"):
        choose(NAME, tokenizer_path.with_name("t.model"), reference, corpus)


class Fragile:
    """What fastokens' own class is to a module whose tokenizer panics."""

    class Tokenizer:
        @staticmethod
        def from_json_str(content: str) -> "Fragile.Tokenizer":
            return Fragile.Tokenizer()

        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

        def encode_batch_flat(self, texts: list[str], **options: bool) -> None:
            raise BaseException("a panic")


def test_a_backend_that_fails_on_a_text_is_left_to_the_reference(
    plant: Callable[..., Tokenizer],
    tokenizer_path: Path,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fastokens = FAST_BACKENDS["fastokens"]
    reference = plant(None)
    monkeypatch.setitem(FAST_BACKENDS, NAME, lambda module, content: fastokens(Fragile, content))
    choice = choose("auto", tokenizer_path, reference, corpus)
    assert choice.name == "reference"
    assert "failed on 256 texts (BaseException: a panic); use --backend reference" in choice.reason


class Counted:
    """A module whose tokenizers are counted: those that were loaded, and the most at a time."""

    loaded = 0
    alive = 0
    most = 0

    class Tokenizer(Fragile.Tokenizer):
        @staticmethod
        def from_json_str(content: str) -> "Counted.Tokenizer":
            Counted.loaded += 1
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            return Counted.Tokenizer()

        def __del__(self) -> None:
            Counted.alive -= 1

        def encode_batch_flat(self, texts: list[str], **options: bool) -> tuple[bytes, bytes]:
            return b"", bytes(8 * (len(texts) + 1))


def test_what_a_fast_library_remembers_of_texts_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_backends, "_CHARACTERS_OF_A_CACHE", 10)
    encoder = FAST_BACKENDS["fastokens"](Counted, "{}")
    for _ in range(9):
        encoder.encode_flat(["four", "five"])
    assert (Counted.loaded, Counted.most) == (5, 1)


def test_a_small_corpus_is_not_worth_a_proof(tokenizer_path: Path, corpus: Corpus) -> None:
    choice = choose("auto", tokenizer_path, load_tokenizer(tokenizer_path), corpus)
    assert (choice.name, choice.proof) == ("reference", None)


def test_auto_goes_on_with_the_reference_and_the_build_says_why(
    plant: Callable[..., Tokenizer],
    tokenizer_path: Path,
    corpus_path: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    plant("0-17 ")
    listener = SilentListener()
    build(corpus_path, tmp_path / "set", tokenizer_path, backend="auto", listener=listener)
    assert folder_bytes(tmp_path / "set") == folder_bytes(finished)
    [notice] = listener.notices
    assert notice.startswith(f"backend    reference: {NAME} of unknown version does not tokenize")
    with pytest.raises(ParityError):
        build(corpus_path, tmp_path / "named", tokenizer_path, backend=NAME)
    assert not (tmp_path / "named" / "manifest.json").exists()


def test_the_manifest_keeps_the_proof_outside_of_the_fingerprint(finished: Path) -> None:
    old = read_manifest(finished)
    assert old.backend is None
    assert "backend" not in json.loads((finished / "manifest.json").read_text())
    proof = BackendProof("fastokens", "0.3.5", "tokenizers 0.22", 9000, 60, 300_000, 100_000)
    new: Manifest = replace(old, backend=proof)
    assert new.fingerprint == old.fingerprint


def test_a_proof_is_read_as_it_was_written(finished: Path, tmp_path: Path) -> None:
    proof = BackendProof("fastokens", "0.3.5", "tokenizers 0.22", 9000, 60, 300_000, 100_000)
    manifest = replace(read_manifest(finished), backend=proof)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_the_adversarial_texts_are_the_same_each_time_and_aim_everywhere(
    tokenizer_path: Path,
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    made = [
        adversarial_texts(tokenizer.added_tokens, decode=tokenizer.decode, ids=tokenizer.vocab_size)
        for _ in range(2)
    ]
    assert made[0] == made[1]
    texts = made[0]
    assert len(texts) > 5000
    everything = "".join(texts)
    everything.encode()  # no lone surrogates: such a document never reaches a tokenizer
    held = {unicodedata.category(char) for char in everything}
    assert held >= {"Cc", "Cf", "Co", "Lo", "Lm", "Lt", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Zl"}
    assert {"", "a", "\ufeff", " " * 129, "<|endoftext|>", "a<|endoftext|>b"} <= set(texts)
    assert "\u200d" in everything
    assert max(map(len, texts)) >= 5000


def test_the_sample_is_the_same_each_time_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [json.dumps({"text": text}) for text in made_texts(400)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(texts[::-1] if name == "a.jsonl" else texts))
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n' * 1000)
    # As a file is called on some archives' disks.
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text(texts[0])
    corpus = discover([tmp_path], DiscoveryOptions())
    monkeypatch.setattr(parity, "_SAMPLE_BYTES", (3000, 3000))
    sample = sample_corpus(corpus, "text")
    assert sample == sample_corpus(corpus, "text")
    assert 2000 < sum(map(len, sample)) <= 3000


@pytest.mark.parametrize("name", FAST_BACKENDS)
def test_a_fast_backend_gives_the_same_bytes_as_the_reference(
    name: str, corpus_path: Path, tokenizer_path: Path, finished: Path, tmp_path: Path
) -> None:
    pytest.importorskip(name, reason=INSTALL)
    result = build(corpus_path, tmp_path / "set", tokenizer_path, backend=name, workers=2)
    expected, found = folder_bytes(finished), folder_bytes(tmp_path / "set")
    assert result.manifest.backend is not None
    assert result.manifest.backend.name == name
    assert expected.keys() == found.keys()
    assert [n for n in expected if expected[n] != found[n]] == ["manifest.json"]
    assert result.manifest.fingerprint == open_dataset(finished).fingerprint
    again = build(corpus_path, tmp_path / "set", tokenizer_path, backend="reference")
    assert again.was_complete


@pytest.mark.parametrize("name", FAST_BACKENDS)
def test_a_fast_backend_reads_control_tokens_in_text_as_text(
    name: str, tokenizer_path: Path
) -> None:
    pytest.importorskip(name, reason=INSTALL)
    reference = load_tokenizer(tokenizer_path)
    ids, lengths = load_encoder(name, tokenizer_path, eos_token="<|endoftext|>").encode_flat(
        ["before<|endoftext|>after", "", "<|endoftext|>"]
    )
    assert reference.eos_id not in ids
    assert lengths.tolist()[1] == 0
    assert reference.decode(ids.tolist()) == "before<|endoftext|>after<|endoftext|>"
