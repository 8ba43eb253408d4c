"""Tokenizers: Hugging Face `tokenizer.json` and SentencePiece `.model` behind one protocol; BPE
training.

Text never becomes a control token: "<|endoftext|>" inside a document is encoded as the characters
it consists of, so the only EOS of a document is the one that the pipeline appends.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mamba_dist.data.durable import hash_file, write_durably
from mamba_dist.data.manifest import Manifest, Probe, TokenizerIdentity
from mamba_dist.errors import DataError

END_OF_TEXT = "<|endoftext|>"
KNOWN_EOS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot|>", "<|im_end|>", "[EOS]")
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # code\n",
    "Zwölf Boxkämpfer, naïve café, 東京タワー, Привет, 🙂👍🏽",
    "  leading and trailing \t white space \r\n\n ",
    "<|endoftext|></s>",
)
_BYTES = 256
_TEXTS_PER_CALL = 256


# ids (tokens,) uint32, lengths (texts,) int64
FlatIds = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]


class Tokenizer(Protocol):
    """Text to ids and back; ids are uint32."""

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, added tokens included."""

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""

    @property
    def eos_token(self) -> str:
        """The piece of eos_id."""

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Text outside of the vocabulary's merges: control tokens, and what is never split."""

    @property
    def identity(self) -> TokenizerIdentity:
        """What a manifest says about this tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text, without any special token, without EOS."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The same ids end to end, and how many each text has."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens give nothing."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id."""


def load_tokenizer(path: Path | str, *, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or SentencePiece `.model` file.

    `eos_token` None takes the first of KNOWN_EOS that the vocabulary has, or SentencePiece's own.

    Raises:
        DataError: the file is missing or unreadable, or no end-of-text token can be told.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist; give a tokenizer.json or .model file, or train one: "
            f"`python tools/train_tokenizer.py CORPUS --vocab-size 8192 --output tokenizer.json`"
        )
    if path.suffix == ".model":
        return _SentencePiece(path, eos_token)
    return _HuggingFace(path, eos_token)


def check_tokenizer(manifest: Manifest, path: Path | str) -> Tokenizer:
    """The tokenizer at `path`, if it is the one that made the data set's ids.

    Raises:
        DataError: it is another one, or the installed library gives other ids.
    """
    made = manifest.tokenizer
    tokenizer = load_tokenizer(path, eos_token=made.eos_token)
    found = tokenizer.identity
    if found.sha256 != made.sha256:
        raise DataError(
            f"tokenizer {path} does not match the shards: they were made with {made.file} (sha256 "
            f"{made.sha256[:12]}, {made.vocab_size} ids), this is sha256 {found.sha256[:12]} with "
            f"{found.vocab_size} ids; use the {made.file} in the data set's folder, or tokenize "
            "again with this one"
        )
    if found.probes != made.probes:
        raise DataError(
            f"tokenizer {path} is the one that made the shards, but the installed library now "
            "gives other ids for the same text; install the version used then, or tokenize again"
        )
    return tokenizer


class _HuggingFace:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, path: Path, eos_token: str | None) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            # The library raises the bare class on a file that it cannot parse.
            if type(error) is not Exception and not isinstance(error, OSError | ValueError):
                raise
            raise DataError(
                f"{path} is no tokenizer.json that can be read: {error}; expected a file written "
                f"by the "
                "tokenizers library, or a SentencePiece file named .model"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self.vocab_size = max(self._pieces) + 1
        self.eos_token, self.eos_id = _choose_eos(path, eos_token, vocabulary)
        self._path = path

    @property
    def added_tokens(self) -> tuple[str, ...]:
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(added[index].content for index in sorted(added))

    @property
    def identity(self) -> TokenizerIdentity:
        return _identity(self, self._path, "tokenizers")

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return _split(self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _joined(one.ids for one in encoded)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._pieces[index] for index in ids]


class _SentencePiece:
    """A SentencePiece `.model`."""

    def __init__(self, path: Path, eos_token: str | None) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{path} is no SentencePiece model that can be read: {error}"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        own = self._model.eos_id()
        if eos_token is None and own >= 0:
            self.eos_id, self.eos_token = own, str(self._model.id_to_piece(own))
        else:
            vocabulary = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
            self.eos_token, self.eos_id = _choose_eos(path, eos_token, vocabulary)
        self._path = path
        self.added_tokens = ()

    @property
    def identity(self) -> TokenizerIdentity:
        return _identity(self, self._path, "sentencepiece")

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return _split(self.encode_flat(texts))

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        return _joined(self._model.encode(list(texts), out_type=int, num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([int(index) for index in ids]))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(self._model.id_to_piece(int(index))) for index in ids]


def _joined(lists: Iterable[list[int]]) -> FlatIds:
    # An array takes a list's ints in half the time of numpy; "I" is 32 bits wherever Python runs.
    ids = array("I")
    lengths = array("q")
    for one in lists:
        ids.fromlist(one)
        lengths.append(len(one))
    return np.array(ids, dtype=np.uint32), np.array(lengths, dtype=np.int64)


def _split(flat: FlatIds) -> list[npt.NDArray[np.uint32]]:
    ids, lengths = flat
    return np.split(ids, np.cumsum(lengths)[:-1]) if lengths.size else []


def _choose_eos(path: Path, wanted: str | None, vocabulary: dict[str, int]) -> tuple[str, int]:
    for token in KNOWN_EOS if wanted is None else (wanted,):
        if token in vocabulary:
            return token, vocabulary[token]
    if wanted is not None:
        raise DataError(f"{path} has no token {wanted!r}; name one that it has by --eos")
    raise DataError(
        f"{path} has none of the usual end-of-text tokens ({', '.join(KNOWN_EOS)}); name its own "
        f"by --eos"
    )


def _identity(tokenizer: Tokenizer, path: Path, kind: str) -> TokenizerIdentity:
    probes = zip(PROBE_TEXTS, tokenizer.encode_batch(PROBE_TEXTS), strict=True)
    return TokenizerIdentity(
        kind=kind,
        file=dataset_file_name(path),
        sha256=hash_file(path).sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token=tokenizer.eos_token,
        eos_id=tokenizer.eos_id,
        probes=tuple(Probe(text, tuple(ids.tolist())) for text, ids in probes),
    )


def dataset_file_name(path: Path) -> str:
    """The name under which a data set folder keeps a copy of the tokenizer at `path`."""
    return "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)
) -> str:
    """A byte-level BPE tokenizer (as GPT-2's: any text round-trips) as the content of a
    tokenizer.json.

    Deterministic: the same texts in the same order give the same bytes. Special tokens come first,
    so <|endoftext|> is id 0. A small corpus may give fewer than `vocab_size` ids.

    Raises:
        DataError: the vocabulary cannot hold the bytes and special tokens, or there are no texts.
    """
    least = _BYTES + len(special_tokens)
    if vocab_size < least:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: {_BYTES} bytes and {len(special_tokens)} "
            f"special tokens need at least {least}"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counter = _Counter(texts)
    tokenizer.train_from_iterator(counter.grouped(), trainer)
    if counter.seen == 0:
        raise DataError("no text to train a tokenizer on; every document was empty or bad")
    return _canonical(json.loads(tokenizer.to_str()))


class _Counter:
    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.seen = 0

    def grouped(self) -> Iterator[list[str]]:
        group: list[str] = []
        for text in self._texts:
            self.seen += 1
            group.append(text)
            if len(group) == _TEXTS_PER_CALL:
                yield group
                group = []
        yield group


def _canonical(content: dict[str, Any]) -> str:
    # The library writes the vocabulary in an order of its own; by id it reads and compares well.
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: int(entry[1])))
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def save_tokenizer(path: Path, content: str) -> None:
    """Writes the content of a tokenizer.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, content.encode())
