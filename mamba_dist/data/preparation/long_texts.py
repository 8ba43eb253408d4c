"""Encoding a long text in pieces that give the ids of the whole.

An encoder takes some hundred bytes of memory a character, so a text of more than LONG_CHARACTERS is
cut, at the first fit place after each PIECE_CHARACTERS: beside white space that stands alone, a
letter or digit behind it. Byte-level tokenizers (GPT-2's and later patterns) and those that split
at white space give the same ids if the second piece begins with it, or the first ends with a line
feed. Tokenizers that put a space before every text (SentencePiece, `Metaspace`, `Prepend`) do if it
is a space and is left out, as no entry of their vocabularies goes on over the beginning of a word.

Which cuts are exact is not read from the tokenizer's file but tried, on some ten thousand texts
that are made to tempt, and no entry of the vocabulary may reach over a cut. A tokenizer may still
mind what stands there (an added token that takes the space behind it, a normaliser that replaces
two words, a split that looks back), so each place is tried before it is used: what lies around it
must give the same ids cut and whole, in windows of several sizes, as pairs that are counted from a
window's beginning may fall right in one. That is 2 % more text to encode. Not exact, and not to be
seen in a trial, are SentencePiece's unigram models: they add up scores in 32 bits along the text,
so that of a long one, cut or whole, splits of nearly equal score are taken by chance.
"""

import functools
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

import numpy as np

from mamba_dist.data.preparation.adversarial import adversarial_texts
from mamba_dist.data.preparation.fast_backends import Encoder, load_encoder
from mamba_dist.data.tokenization import load_tokenizer

LONG_CHARACTERS = 1 << 18
PIECE_CHARACTERS = 1 << 17
_PAIRS_PER_CALL = 256
_NOWHERE = r"(?!)"
# Characters before and after a place.
_WINDOWS = ((256, 256), (193, 128), (131, 64), (67, 32))
_REACH_CHARACTERS = max(after for _, after in _WINDOWS)
# Of one piece. A text that refuses so many is encoded whole or not at all.
_MOST_TRIED = 1000
# Around the cuts of the trial: letters of several scripts and cases, digits, signs.
_ENDS = ("the", "I", "x", "9", "2024", "é", "ß", "東", "я", "한", "self", "A1", "ing", "न")
_BEGINNINGS = ("a", "The", "Z", "7", "19", "über", "京", "Ж", "글", "return", "s", "re", "ll", "م")
_SIGNS = (".", "。", "}", ";", "!?", ">", "_", "…", "\u0301")


class Cut(Enum):
    """Where a text may be cut; each value is the pattern of what stands there."""

    BEFORE_SPACE = r"(?<=[^\W_])(?=[ \n][^\W_])"
    AFTER_LINE = r"(?<=\S\n)(?=[^\W_])"
    AT_SPACE = r"(?<=[^\W_]) (?=[^\W_])"


# What an entry of the vocabulary that reaches over a cut holds.
_OVER = {
    Cut.BEFORE_SPACE: re.compile(r"[^\W_][ \n]"),
    Cut.AFTER_LINE: re.compile(r"\n[^\W_]"),
    Cut.AT_SPACE: re.compile(r"[^\W_] "),
}


class UncuttableError(Exception):
    """A text has a stretch without any place to cut that is too long to be one piece."""


def cut_text(
    texts: Iterable[str], cuts: Sequence[Cut], *, encoder: Encoder, most_characters: int
) -> Iterator[str]:
    """The pieces of a text that arrives in strings; they do not depend on where those end.

    Raises:
        UncuttableError: a piece would be longer than `most_characters`.
    """
    place = re.compile("|".join(cut.value for cut in cuts) or _NOWHERE)
    most = max(most_characters, LONG_CHARACTERS)
    pending, start, searched, tried = "", 0, PIECE_CHARACTERS, 0
    for text in itertools.chain(texts, [None]):
        pending, start, searched = pending[start:] + (text or ""), 0, searched - start
        while True:
            found = place.search(pending, searched) if tried < _MOST_TRIED else None
            if found is None or found.start() - start > most:
                if len(pending) - start <= most:
                    # A place needs its neighbours, which may come with the next string.
                    searched = max(searched, len(pending) - 2)
                    break
                found = _last_place(place, pending, start, encoder)
            elif text is not None and len(pending) - found.end() < _REACH_CHARACTERS:
                searched = found.start()
                break
            elif not _is_seamless(found, pending, start, encoder):
                searched, tried = found.start() + 1, tried + 1
                continue
            yield pending[start : found.start()]
            start, tried = found.end(), 0
            searched = start + PIECE_CHARACTERS
    yield pending[start:]


def _last_place(place: re.Pattern[str], text: str, start: int, encoder: Encoder) -> re.Match[str]:
    """The last place that makes a piece shorter than the usual."""
    places = place.finditer(text, start + 1, start + PIECE_CHARACTERS)
    for found in reversed(deque(places, maxlen=_MOST_TRIED)):
        if _is_seamless(found, text, start, encoder):
            return found
    raise UncuttableError


def _is_seamless(place: re.Match[str], text: str, start: int, encoder: Encoder) -> bool:
    """Whether what lies around a place, after `start`, has the same ids if it is cut there."""
    begin, end = place.span()
    for before, after in _WINDOWS:
        first, last = max(start, begin - before), end + after
        whole = encoder.encode_flat([text[first:last]])[0]
        halves = encoder.encode_flat([text[first:begin], text[end:last]])[0]
        if not np.array_equal(whole, halves):
            return False
    return True


@functools.lru_cache(maxsize=1)
def exact_cuts(backend: str, tokenizer: str, *, eos_token: str) -> tuple[Cut, ...]:
    """The cuts that leave a tokenizer's ids as they are.

    Raises:
        DataError: see `load_encoder`.
    """
    reference = load_tokenizer(tokenizer, eos_token=eos_token)
    texts = adversarial_texts(
        reference.added_tokens, decode=reference.decode, ids=reference.vocab_size
    )
    encoder = load_encoder(backend, tokenizer, eos_token=eos_token)
    ids = range(reference.vocab_size)
    entries = [reference.decode([index]).replace("▁", " ") for index in ids]
    return tuple(
        cut
        for cut in Cut
        if not any(map(_OVER[cut].search, entries)) and _is_exact(encoder, cut, texts)
    )


def _is_exact(encoder: Encoder, cut: Cut, texts: list[str]) -> bool:
    seams = zip(itertools.pairwise(texts), itertools.cycle(_seams(cut)), strict=False)
    pairs = [(one + end, gap, start + two) for (one, two), (end, gap, start) in seams]
    for number in range(0, len(pairs), _PAIRS_PER_CALL):
        group = pairs[number : number + _PAIRS_PER_CALL]
        wholes = encoder.encode_flat(["".join(pair) for pair in group])[0]
        pieces = [piece for first, _, second in group for piece in (first, second)]
        if not np.array_equal(wholes, encoder.encode_flat(pieces)[0]):
            return False
    return True


def _seams(cut: Cut) -> list[tuple[str, str, str]]:
    """What ends a first piece, is left out, and begins a second one."""
    words = list(itertools.product(_ENDS, _BEGINNINGS))
    if cut is Cut.AT_SPACE:
        return [(end, " ", start) for end, start in words]
    if cut is Cut.AFTER_LINE:
        signed = itertools.product(_SIGNS, _BEGINNINGS)
        return [(f"{end}\n", "", start) for end, start in (*words, *signed)]
    return [(end, "", space + start) for end, start in words for space in " \n"]
