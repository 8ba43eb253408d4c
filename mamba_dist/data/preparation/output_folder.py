"""What may lie in the folder that a data set is to be made in, and what is removed there.

A data set takes the place of an older one, whose files are known by their names alone; so no other
file may have such a name.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from mamba_dist.data.document_ids import DOCUMENT_IDS_NAME
from mamba_dist.data.durable import hash_file
from mamba_dist.data.manifest import BAD_DOCUMENTS_NAME, INPUTS_NAME, MANIFEST_NAME
from mamba_dist.data.packing_plan import PLAN_PATTERN
from mamba_dist.data.preparation.folder_walk import file_id, status_of
from mamba_dist.data.preparation.sources import InputFile
from mamba_dist.data.shard_index import INDEX_NAME, SPLITS
from mamba_dist.errors import DataError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_LISTS = (INDEX_NAME, INPUTS_NAME, BAD_DOCUMENTS_NAME, DOCUMENT_IDS_NAME)
_OURS = re.compile(
    "|".join(
        (
            rf"(?:{'|'.join(SPLITS)})-\d{{5,}}\.arrow",
            *map(re.escape, (*_LISTS, *_TOKENIZERS)),
            fnmatch.translate(PLAN_PATTERN),
        )
    )
)


def is_ours(name: str) -> bool:
    """Whether a file of this name is a data set's, the manifest apart."""
    return _OURS.fullmatch(name) is not None


def refuse_foreign_files(output: Path) -> None:
    """Nothing, if the folder holds hidden files and a data set's alone.

    Raises:
        DataError: it holds others.
    """
    foreign = [
        path.name
        for path in _shown(output)
        if path.name != MANIFEST_NAME and not is_ours(path.name)
    ]
    if foreign:
        raise DataError(
            f"{output} is not empty and not a data set (it holds {', '.join(foreign[:3])}); give a "
            "new folder by --output"
        )


def refuse_inputs(output: Path, files: Iterable[InputFile]) -> None:
    """Nothing, if no input lies there under a data set's name.

    Raises:
        DataError: one does, and would be removed.
    """
    held = {file_id(path.stat()): path.name for path in _shown(output) if path.exists()}
    for file in files if held else ():
        status = status_of(file.path)
        if status is not None and file_id(status) in held:
            raise DataError(
                f"{output} holds {held[file_id(status)]}, which is an input; give a new folder by "
                "--output"
            )


def refuse_another_tokenizer(output: Path, sha256: str) -> None:
    """Nothing, unless a tokenizer of another hash is all that the folder holds: one that was
    trained into it, of which there may be no copy.

    Raises:
        DataError: it is.
    """
    shown = _shown(output)
    if {path.name for path in shown} - set(_TOKENIZERS):
        return
    for path in shown:
        if hash_file(path).sha256 != sha256:
            raise DataError(
                f"{output} holds {path.name}, which is not the tokenizer in use and would be "
                "replaced; give it by --tokenizer, or a new folder by --output"
            )


def _shown(output: Path) -> list[Path]:
    return sorted(path for path in output.iterdir() if not path.name.startswith("."))
