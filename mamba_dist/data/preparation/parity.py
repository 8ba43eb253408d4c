"""Which backend encodes a corpus: a fast one only after it gave the reference's ids for every text
of two sets, the adversarial one and a sample of the corpus itself.

The backend must not change one id, so it is not part of what a data set is: shards, fingerprint
and settings are the same whichever made them, and the proof stands in the manifest beside them.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from mamba_dist.data.manifest import BackendProof
from mamba_dist.data.preparation.adversarial import adversarial_texts
from mamba_dist.data.preparation.documents import BadDocument, read_documents
from mamba_dist.data.preparation.fast_backends import (
    AUTO,
    FAST_BACKENDS,
    REFERENCE,
    Encoder,
    FastBackendError,
    backend_version,
    load_encoder,
)
from mamba_dist.data.preparation.sources import Corpus
from mamba_dist.data.tokenization import FlatIds, Tokenizer

# A smaller corpus is done by the reference before a proof would be.
LEAST_BYTES = 4 << 20
# A share of the corpus: encoding the sample by the reference is what a proof costs.
_SAMPLE_SHARE = 1 / 128
_SAMPLE_BYTES = (1 << 19, 1 << 23)
# How much more is read to choose from, and how much of one document is taken.
_READ_FACTOR = 16
_DOCUMENT_CHARACTERS = 1 << 16
_TEXTS_PER_CALL = 256
_SHOWN_CHARACTERS = 80
_SHOWN_IDS = 6


@dataclass(frozen=True)
class BackendChoice:
    """The backend to use; `proof` None for the reference. `reason` says why it is this one."""

    name: str
    encoder: Encoder
    proof: BackendProof | None
    reason: str


class ParityError(FastBackendError):
    """A backend gives other ids than the reference."""


def choose_backend(
    wanted: str, tokenizer: Path, *, reference: Tokenizer, corpus: Corpus, text_field: str
) -> BackendChoice:
    """The reference, or a fast backend that was proven equal to it.

    `wanted` is "reference", the name of a fast backend, or "auto": the first fast one that passes,
    else the reference.

    Raises:
        FastBackendError: one asked for by name is absent, fails or differs.
        DataError: the corpus cannot be read.
    """
    if wanted == REFERENCE:
        return BackendChoice(REFERENCE, reference, None, "as asked")
    if wanted == AUTO and corpus.bytes < LEAST_BYTES:
        return BackendChoice(REFERENCE, reference, None, "done sooner than a faster one is proven")
    refusals = []
    for name in FAST_BACKENDS if wanted == AUTO else (wanted,):
        try:
            fast = load_encoder(name, tokenizer, eos_token=reference.eos_token)
            proof = prove_parity(
                name,
                fast,
                reference,
                adversarial=adversarial_texts(
                    reference.added_tokens, decode=reference.decode, ids=reference.vocab_size
                ),
                own=sample_corpus(corpus, text_field),
            )
        except FastBackendError as error:
            if wanted != AUTO:
                raise
            refusals.append(str(error))
        else:
            return BackendChoice(name, fast, proof, _summary(proof))
    return BackendChoice(REFERENCE, reference, None, "; ".join(refusals))


def prove_parity(
    name: str,
    fast: Encoder,
    reference: Tokenizer,
    *,
    adversarial: Sequence[str],
    own: Sequence[str],
) -> BackendProof:
    """The proof that `fast` gives the reference's ids for all the texts.

    Raises:
        ParityError: it does not; the message has the text and both ids.
        FastBackendError: it fails on a text.
    """
    tokens = 0
    for group in _groups([*adversarial, *own]):
        expected = reference.encode_flat(group)
        # Twice, since the second time a backend's caches answer.
        for _ in range(2):
            if not _are_equal(expected, fast.encode_flat(group)):
                raise ParityError(_difference(name, fast, reference, group))
        tokens += expected[0].size
    return BackendProof(
        name=name,
        version=backend_version(name),
        reference=f"tokenizers {backend_version(REFERENCE)}",
        adversarial_texts=len(adversarial),
        corpus_documents=len(own),
        text_bytes=sum(len(text.encode()) for text in (*adversarial, *own)),
        tokens=tokens,
    )


def sample_corpus(corpus: Corpus, text_field: str) -> list[str]:
    """Beginnings of documents, 0.5 to 8 MiB by the size of the corpus, chosen by their content.

    They are chosen among sixteen times as much, from files in the order of their names' hashes.

    Raises:
        DataError: a file cannot be read.
    """
    least, most = _SAMPLE_BYTES
    wanted = min(max(int(corpus.bytes * _SAMPLE_SHARE), least), most)
    found = sorted(
        (xxhash.xxh3_64_intdigest(text.encode()), text)
        for text in _beginnings(corpus, text_field, read_bytes=_READ_FACTOR * wanted)
    )
    ends = itertools.accumulate(len(text) for _, text in found)
    return [text for (_, text), end in zip(found, ends, strict=True) if end <= wanted]


def _beginnings(corpus: Corpus, text_field: str, *, read_bytes: int) -> Iterator[str]:
    # os.fsencode, since a file's name need not be UTF-8.
    files = sorted(corpus.files, key=lambda file: xxhash.xxh3_64_intdigest(os.fsencode(file.name)))
    share = max(read_bytes // len(files), _DOCUMENT_CHARACTERS)
    left = read_bytes
    for file in files:
        left_after = left - share
        for document in read_documents(file, text_field):
            if not isinstance(document, BadDocument):
                text = next(document.texts())
                yield text[:_DOCUMENT_CHARACTERS]
                left -= len(text)
            else:  # bad ones count too, or a wrong field's name would have everything read
                left -= _DOCUMENT_CHARACTERS
            if left <= max(left_after, 0):
                break
        if left <= 0:
            return


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        yield texts[start : start + _TEXTS_PER_CALL]


def _are_equal(one: FlatIds, other: FlatIds) -> bool:
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def _difference(name: str, fast: Encoder, reference: Tokenizer, group: Sequence[str]) -> str:
    """The first text of a group whose ids differ, alone or, failing that, in the group."""
    head = f"{name} {backend_version(name)} does not tokenize as the reference does:"
    for text in group:
        expected, found = reference.encode_flat([text])[0], fast.encode_flat([text])[0]
        if np.array_equal(expected, found):
            continue
        same = min(expected.size, found.size)
        differs = np.flatnonzero(expected[:same] != found[:same])
        at = int(differs[0]) if differs.size else same
        shown, first = ascii(text), max(0, at - _SHOWN_IDS)
        if len(text) > _SHOWN_CHARACTERS:
            near = reference.decode(expected[first : at + _SHOWN_IDS].tolist())
            shown = f"{text[:_SHOWN_CHARACTERS]!a}…, near {near!a},"
        ids, others = (a[at : at + _SHOWN_IDS].tolist() for a in (expected, found))
        return f"{head} of {shown} it makes from id {at} on {others}, the reference {ids}"
    return f"{head} it gives other ids to {len(group)} texts together than one by one"


def _summary(proof: BackendProof) -> str:
    return (
        f"{proof.tokens:,} ids equal to the reference's, of {proof.adversarial_texts:,} "
        f"adversarial texts and {proof.corpus_documents:,} of the corpus"
    )
