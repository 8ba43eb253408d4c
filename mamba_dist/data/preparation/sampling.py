"""A sample of a corpus, for a tokenizer to be trained on."""

from collections.abc import Iterable, Iterator

import xxhash

from mamba_dist.data.preparation.documents import BadDocument, read_documents
from mamba_dist.data.preparation.sources import InputFile


def sample_texts(
    files: Iterable[InputFile], *, text_field: str, sample_bytes: int, total_bytes: int
) -> Iterator[str]:
    """The texts of good documents, about `sample_bytes` of them, chosen by their content."""
    limit = 2**64 if total_bytes <= sample_bytes else int(2**64 * sample_bytes / total_bytes)
    for file in files:
        for document in read_documents(file, text_field):
            if isinstance(document, BadDocument):
                continue
            for text in document.texts():
                if limit == 2**64 or xxhash.xxh3_64_intdigest(text.encode()) < limit:
                    yield text
