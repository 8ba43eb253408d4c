import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from made_data import made_texts, write_dataset

from mamba_dist.data.manifest import Manifest, Probe
from mamba_dist.data.tokenization import (
    PROBE_TEXTS,
    check_tokenizer,
    load_tokenizer,
    train_bpe,
)
from mamba_dist.errors import DataError

TEXTS = made_texts(200, seed=5)


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


def train_sentencepiece(folder: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


def with_content(path: Path, content: dict[str, object]) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_any_text_comes_back_from_a_trained_bpe(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for text, ids in zip(PROBE_TEXTS, tokenizer.encode_batch(PROBE_TEXTS), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.max() < tokenizer.vocab_size == 350


def test_end_of_text_is_id_zero_and_never_comes_out_of_text(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<|endoftext|>", 0)
    [ids] = tokenizer.encode_batch(["before<|endoftext|>after"])
    assert 0 not in ids
    assert tokenizer.decode([*ids.tolist(), 0]) == "before<|endoftext|>after"


def test_pieces_are_the_entries_of_the_vocabulary(tokenizer_path: Path) -> None:
    assert load_tokenizer(tokenizer_path).pieces([0, 1]) == ["<|endoftext|>", "!"]


def test_training_is_deterministic_for_any_number_of_threads(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from made_data import made_texts\n"
        "from mamba_dist.data.tokenization import train_bpe\n"
        "sys.stdout.buffer.write(train_bpe(made_texts(400), vocab_size=500).encode())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
            capture_output=True,
        ).stdout
        for threads in ("1", "2", "4")
    }
    assert len(found) == 1
    assert len(found.pop()) > 1000


def test_special_tokens_come_first() -> None:
    content = train_bpe(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>", "<|user|>"])
    vocabulary = json.loads(content)["model"]["vocab"]
    assert list(vocabulary)[:2] == ["<|endoftext|>", "<|user|>"]
    assert list(vocabulary.values()) == list(range(300))


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"--vocab-size 256 is too small: .* at least 257"):
        train_bpe(TEXTS, vocab_size=256)


def test_training_on_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_bpe([], vocab_size=300)


def test_a_sentencepiece_model_encodes_and_decodes(sentencepiece_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    [ids] = tokenizer.encode_batch(["state space café </s>"])
    assert ids.tolist() == reference.encode("state space café </s>")
    assert tokenizer.decode(ids.tolist()) == "state space café </s>"
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", reference.eos_id())
    assert tokenizer.vocab_size == 400
    assert tokenizer.pieces([tokenizer.eos_id]) == ["</s>"]
    assert tokenizer.identity.kind == "sentencepiece"


def test_a_sentencepiece_model_without_eos_needs_one_named(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path, eos_id=-1, user_defined_symbols=["<end>"])
    with pytest.raises(DataError, match=r"none of the usual end-of-text tokens .* by --eos"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, eos_token="<end>")
    assert tokenizer.pieces([tokenizer.eos_id]) == ["<end>"]


def test_the_end_token_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(train_bpe(TEXTS, vocab_size=300, special_tokens=["<|a|>", "<|b|>"]))
    assert load_tokenizer(path, eos_token="<|b|>").eos_id == 1
    with pytest.raises(DataError, match=r"has none of the usual end-of-text tokens"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"has no token '<eos>'; name one that it has by --eos"):
        load_tokenizer(path, eos_token="<eos>")


def test_truncation_padding_and_templates_of_a_file_are_ignored(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    content = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "X", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"X": {"id": "X", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    changed = load_tokenizer(with_content(tmp_path / "t.json", content))
    [expected] = load_tokenizer(tokenizer_path).encode_batch(["a long text about state space"])
    [found] = changed.encode_batch(["a long text about state space"])
    assert found.tolist() == expected.tolist()


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path: Path) -> None:
    words = tokenizers.models.WordLevel({"?": 0, "<eos>": 500}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").vocab_size == 501


def test_a_missing_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json does not exist; .*tools/train_tokenizer.py"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["t.json", "t.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"not a tokenizer", b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is no "):
        load_tokenizer(tmp_path / name)


def manifest_of(folder: Path, tokenizer_path: Path) -> Manifest:
    dataset = write_dataset(folder, [[1, 0]], [[1, 0]])
    identity = load_tokenizer(tokenizer_path).identity
    return Manifest(**{**vars(dataset.manifest), "tokenizer": identity})


def test_the_tokenizer_of_the_shards_passes_the_check(tokenizer_path: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, tokenizer_path)
    assert check_tokenizer(manifest, tokenizer_path).vocab_size == 350


def test_another_tokenizer_than_the_shards_is_refused(tokenizer_path: Path, tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, tokenizer_path)
    other = tmp_path / "other.json"
    other.write_text(train_bpe(TEXTS, vocab_size=360))
    with pytest.raises(
        DataError, match=r"other.json does not match the shards: .*350 ids.*360 ids"
    ):
        check_tokenizer(manifest, other)


def test_a_library_that_encodes_otherwise_than_then_is_refused(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    manifest = manifest_of(tmp_path, tokenizer_path)
    identity = manifest.tokenizer
    drifted = Probe(identity.probes[0].text, (1, 2, 3))
    changed = type(identity)(**{**vars(identity), "probes": (drifted, *identity.probes[1:])})
    with pytest.raises(DataError, match="installed library now gives other ids"):
        check_tokenizer(Manifest(**{**vars(manifest), "tokenizer": changed}), tokenizer_path)
