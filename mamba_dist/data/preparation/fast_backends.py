"""Libraries that give a tokenizer.json's ids many times faster than `tokenizers`, its reference.

Each is optional (`pip install 'mamba-dist[fast]'`), and used only once `parity` has found no
difference. fastokens 0.3.5 (Apache-2.0, no dependencies, wheels for x86-64 and arm64) encodes
GPT-NeoX-20B's text at 26 times the reference's MB per CPU-second.

Left out: gigatoken 0.10 (a third faster still) orders some combining marks otherwise (15 of the
9,700 adversarial texts), takes control tokens in text as such, and brings awkward and typer;
splintr-rs 0.22 is slower at five times the size; tokie, kitoken and tiktoken give other ids.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from mamba_dist.data.tokenization import FlatIds, load_tokenizer
from mamba_dist.errors import DataError

REFERENCE: Final = "reference"
AUTO: Final = "auto"
# fastokens remembers the words it has seen: after 3 GB of English that takes 90 MB more. Loading it
# anew takes 0.3 s, which is what some 10 MB of text take.
_CHARACTERS_OF_A_CACHE: Final = 1 << 30
INSTALL: Final = "pip install 'mamba-dist[fast]'"


class Encoder(Protocol):
    """Text to ids; any Tokenizer is one."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """ids (tokens,) uint32 end to end, lengths (texts,) int64; no special tokens, no EOS."""


class FastBackendError(DataError):
    """A fast backend cannot be used."""


class BackendAbsentError(FastBackendError):
    """It is not installed, or cannot load a tokenizer."""


def load_encoder(backend: str, tokenizer: Path | str, *, eos_token: str) -> Encoder:
    """The encoder of a tokenizer file, by the reference or by one of FAST_BACKENDS.

    Raises:
        BackendAbsentError: see the class.
        DataError: the reference cannot load the file.
    """
    if backend == REFERENCE:
        return load_tokenizer(tokenizer, eos_token=eos_token)
    path = Path(tokenizer)
    if path.suffix == ".model":
        raise BackendAbsentError(
            f"{backend} reads tokenizer.json files only, not SentencePiece's {path.name}"
        )
    try:
        module = importlib.import_module(backend)
    # A binary wheel for another processor or system fails with almost any exception.
    except Exception as error:
        raise BackendAbsentError(
            f"{backend} cannot be imported ({type(error).__name__}: {error}); {INSTALL}"
        ) from error
    try:
        return FAST_BACKENDS[backend](module, path.read_text(encoding="utf-8"))
    except Exception as error:
        raise BackendAbsentError(
            f"{backend} {backend_version(backend)} cannot load {path.name} "
            f"({type(error).__name__}: {error})"
        ) from error


def backend_version(backend: str) -> str:
    """The installed version of the library behind a backend."""
    try:
        return version("tokenizers" if backend == REFERENCE else backend)
    except PackageNotFoundError:
        return "of unknown version"


def use_one_thread() -> None:
    """Keeps the libraries' own pools from multiplying with the number of workers.

    To be called before the first text is encoded.
    """
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    os.putenv("RAYON_NUM_THREADS", "1")


class _Fastokens:
    def __init__(self, module: Any, content: str) -> None:
        self._module = module
        self._content = content
        self._load()

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        if self._encoded_characters > _CHARACTERS_OF_A_CACHE:
            # Given back before it is loaded again, not after.
            del self._tokenizer
            self._load()
        self._encoded_characters += sum(map(len, texts))
        try:
            # "<|endoftext|>" inside a text is no control token: it is split like other text.
            ids, offsets = self._tokenizer.encode_batch_flat(
                list(texts), add_special_tokens=False, split_special_tokens=True
            )
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        # A limit of its regular expressions is an Exception, a panic in Rust is not even that.
        except BaseException as error:
            raise FastBackendError(
                f"fastokens failed on {len(texts)} texts ({type(error).__name__}: {error}); use "
                "--backend reference"
            ) from error
        ends = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return np.frombuffer(ids, dtype="<u4"), np.diff(ends)

    def _load(self) -> None:
        self._tokenizer = self._module.Tokenizer.from_json_str(self._content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._encoded_characters = 0


FAST_BACKENDS: Final[dict[str, Callable[[Any, str], Encoder]]] = {"fastokens": _Fastokens}
"""By name, the preferred one first: a constructor of the imported module and the file's content."""
