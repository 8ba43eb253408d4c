"""The type of the fixtures `made` and `made_once`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MadeDataset:
    """A data set folder, and the texts it was made of, by the name of their file."""

    folder: Path
    texts: dict[str, str]
