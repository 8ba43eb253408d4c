"""Texts on which tokenizers that mean to be equal differ: some 9,700 short ones, always the same.

What they aim at: pre-tokenisers that classify characters by other tables, normalisation, runs of
white space and digits, added and control tokens inside text, merges at every border of the
vocabulary, words far longer than any cache entry, and fuzz of all of it together.
"""

import itertools
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final

_SEED: Final = 20
_UNICODE: Final = 0x110000
_BUSY: Final = 0x3400
_PER_CATEGORY: Final = 64
_FUZZED: Final = 2500
_DECODED: Final = 2000
_LONGEST_RUN: Final = 130
_SPACES: Final = (" ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u2028", "\u3000")
_CONTRACTIONS: Final = (
    "I'm you're he's it'd we'll they've don't I'M YOU'RE HE'S IT'D WE'LL THEY'VE DON'T 'tis ''s "
    "it’s don’t 's't 're 'ſ 'S' rock'n'roll o'clock"
)
# Composed, decomposed, canonically equal, excluded from composition, of compatibility only.
_COMPOSED: Final = (
    "\u00c5\u212bA\u030a", "\u00e9e\u0301", "\u1ebfe\u0302\u0301", "\uac01\u1100\u1161\u11a8",
    "\ufb01\ufb00", "\u0390\u03b9\u0308\u0301", "\u0958\u0915\u093c", "q\u0307\u0323q\u0323\u0307",
    "\u1e9b\u0323\u017f\u0323\u0307", "\ufb2f\u05d0\u05b8", "\uf900\u8c48", "\u2126\u03a9\u037e;",
    "\U0001d15e\U0001d157\U0001d165", "\u0130i\u0307\u0131\u00df\u1e9e\u0149\u01f0",
)  # fmt: skip
# Families, flags (of regions, cut short, of joined signs), skin tones, keycaps, presentations.
_EMOJI: Final = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f468\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7\U0001f1ef", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f44d\U0001f3fd\U0001f44d\U0001f3ff\U0001f44d", "1\ufe0f\u20e3#\ufe0f\u20e3",
    "\u2764\ufe0f\u2764\u2764\ufe0e\u00a9\ufe0f\u2122\ufe0f",
    "a\U0001f642b \U0001f642 \U0001fae0\u200d",
)  # fmt: skip
_SCRIPTS: Final = (
    "東京タワーは高い。「はい」と言った…", "天地玄黃，宇宙洪荒", "한국어는 띄어쓰기가 있다.",
    "Привет, мир! Ёжик", "Ελληνικά ΐ ὦ", "שָׁלוֹם עוֹלָם", "السَّلامُ عَلَيْكُم ١٢٣٤", "नमस्ते दुनिया १२३",
    "ภาษาไทยไม่มีวรรค", "ພາສາລາວ", "မြန်မာ", "ગુજરાતી", "தமிழ்", "አማርኛ", "ქართული", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "𐍈𐌰𐌹", "𠮷野家", "ⅣⅤ ½⅓ ²³ ①②", "zwölf Boxkämpfer naïve café Ångström",
)  # fmt: skip
_CODE: Final = (
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # code\n", "\tif (a&&b)\t{\n\t\t\t++i;\n\t}\n",
    "https://example.org/a?b=c&d=%20#e", "0xDEADBEEF 1_000_000 3.14e-10 1,234,567.89 ٣٤",
    "<html>\r\n<body class=\"x\">&nbsp;</body>\r\n</html>", "$$\\frac{a}{b}$$ \\u00e9 \\n",
    "=======------~~~~~~......,,,,,!!!!!????", "a_b-c.d/e\\f|g", "();{}[]<>\"'`~@#%^&*+=",
)  # fmt: skip


def adversarial_texts(
    special: Sequence[str], *, decode: Callable[[list[int]], str], ids: int
) -> list[str]:
    """The texts; `special` are the tokenizer's added tokens, `decode` gives the text of
    ids below `ids`.

    None holds a lone surrogate: such a document never reaches a tokenizer.
    """
    rng = random.Random(_SEED)
    texts = [
        *_short(),
        *_runs(),
        *_of_categories(rng),
        *_around_tokens(special),
        *_decoded(rng, decode, ids),
        *_long(rng),
        *_CONTRACTIONS.split(),
        *_CODE,
    ]
    for text in (_CONTRACTIONS, *_COMPOSED, *_EMOJI, *_SCRIPTS):
        texts += [text, f" {text}", f"{text}\n", f"a{text}", text * 3, text.upper()]
        texts += [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
        texts += [text[start:] for start in range(1, min(len(text), 12))]
    return texts + list(_fuzz(rng, (*texts, *special)))


def _short() -> Iterator[str]:
    yield ""
    for point in (*range(0x180), 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x200B, 0x200D, 0xAD, 0x10FFFF):
        char = chr(point)
        yield char
        yield f"a{char}b"
        yield f" {char}{char} "
    yield from ("\ufeffabc", "abc\ufeff", "\ufeff\ufeff", "a\0b\0\0c")


def _runs() -> Iterator[str]:
    for length in range(2, _LONGEST_RUN):
        yield " " * length
        yield f"a{' ' * length}b"
        yield "\n" * length + "x"
        yield "1234567890"[: length % 10] + "7" * length
        yield "\t" * (length // 4) + " " * length
    for space in _SPACES:
        for other in _SPACES:
            yield space + other
            yield f"a{space}{other}b{other}{space}{space} c"
    yield from ("a\r\nb\r\n\r\n\r\nc\r", "a\n \n  \n   b", "x \n", "x\n ", " \r\n \r\n x ")
    yield from (
        char * length for char in "ae.-=_#*/\\'\"é東🙂" for length in (2, 3, 5, 17, 64, 333)
    )


def _of_categories(rng: random.Random) -> Iterator[str]:
    points: dict[str, list[str]] = {}
    # All of the plane's busy beginning, and a part of the rest: a look at each costs 0.3 s.
    looked_at = (*range(_BUSY), *sorted(rng.sample(range(_BUSY, _UNICODE), _BUSY)))
    for char in map(chr, looked_at):
        if (category := unicodedata.category(char)) != "Cs":
            points.setdefault(category, []).append(char)
    for category in sorted(points):
        chosen = [rng.choice(points[category]) for _ in range(_PER_CATEGORY)]
        yield "".join(chosen)
        yield " ".join(chosen)
        for one, two in itertools.pairwise(chosen):
            yield f"x{one}{two} {one}1{two}"
        for marks in range(1, 7):
            yield "e" + "".join(rng.choice(points["Mn"]) for _ in range(marks)) + chosen[marks]


def _around_tokens(special: Sequence[str]) -> Iterator[str]:
    for token in special:
        yield from (token, token * 2, f"a{token}b", f" {token} ", f"\n{token}\n", f"{token}\u0301")
        yield from (token[:-1], token[1:], token.upper(), f"{token[:-1]} {token[-1:]}", f"<{token}")
        yield f"a {token}{token[:2]}{token}  {token} \t{token}"


def _decoded(rng: random.Random, decode: Callable[[list[int]], str], ids: int) -> Iterator[str]:
    """Vocabulary entries side by side: merges that tempt across their border."""
    for _ in range(_DECODED):
        yield decode([rng.randrange(ids) for _ in range(rng.randint(1, 9))])


def _long(rng: random.Random) -> Iterator[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    yield "".join(rng.choice(letters) for _ in range(4000))
    yield "".join(rng.choice("ACGT") for _ in range(4000))
    yield "".join(rng.choice("0123456789abcdef") for _ in range(4000))
    yield "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(1500))
    yield from ("ab" * 2000, "a" * 5000, "é" * 1000, "e\u0301" * 500, "🙂" * 500, "\u0301" * 300)


def _fuzz(rng: random.Random, pool: Sequence[str]) -> Iterator[str]:
    for _ in range(_FUZZED):
        pieces = []
        for _ in range(rng.randint(2, 6)):
            piece = rng.choice(pool)
            start = rng.randrange(len(piece) + 1)
            pieces.append(piece[start : start + rng.randint(1, 12)])
        yield "".join(pieces)
