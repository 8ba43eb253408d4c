"""A look at the first documents, so that a wrong field of ids is found before hours of work."""

from collections.abc import Iterable
from itertools import islice

from mamba_dist.data.preparation.documents import BadDocument, Reading, SliceReader
from mamba_dist.data.preparation.sources import InputFile, whole
from mamba_dist.errors import DataError

_LOOKED_AT = 1000


def check_has_ids(files: Iterable[InputFile], reading: Reading) -> None:
    """Nothing, if an id stands among the first documents of some file, or there are no documents.

    Raises:
        DataError: there are documents, and no id, or only texts, which have none; or a file cannot
        be read.
    """
    looked_at = 0
    have_fields = False
    for file in files:
        if file.format == "text":
            continue
        have_fields = True
        for document in islice(SliceReader(whole(file), reading), _LOOKED_AT):
            if isinstance(document, BadDocument):
                continue
            if document.source_id is not None:
                return
            looked_at += 1
    if looked_at:
        raise DataError(
            f"no document has an id (text or a whole number) in the field {reading.id_field!r}, of "
            f"{looked_at:,} looked at, the first {_LOOKED_AT:,} of each file; give another "
            "--id-field, or none"
        )
    if not have_fields:
        raise DataError(
            f"no input has the field {reading.id_field!r}: each file is one text, which has no id; "
            "leave out --id-field, or give JSON lines, Parquet or Arrow"
        )
