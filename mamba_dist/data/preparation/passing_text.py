"""What tells a text's split and tells it from others, also of one that is not held in memory."""

from collections.abc import Iterator

import xxhash

from mamba_dist.data.preparation.deduplication import Halves, halves_of
from mamba_dist.data.preparation.documents import Document, LongDocument

_SPLIT_SEED = 0x6D616D6261


def split_digest(text: bytes) -> int:
    """What tells a document's split: its content alone, so equal texts never part."""
    return xxhash.xxh3_64_intdigest(text, seed=_SPLIT_SEED)


class PassingText:
    """A text's strings, hashed as they pass by."""

    def __init__(self, document: Document | LongDocument) -> None:
        self._document = document
        self._hash, self._long_hash = xxhash.xxh3_64(seed=_SPLIT_SEED), xxhash.xxh3_128()
        self.bytes = 0
        """Of the text so far."""

    def __iter__(self) -> Iterator[str]:
        for text in self._document.texts():
            encoded = text.encode()
            self._hash.update(encoded)
            self._long_hash.update(encoded)
            self.bytes += len(encoded)
            yield text

    @property
    def digest(self) -> int:
        """Of the text so far: what tells its split."""
        return self._hash.intdigest()

    @property
    def halves(self) -> Halves:
        """Of the text so far: what tells it from others."""
        return halves_of(self._long_hash.intdigest())
