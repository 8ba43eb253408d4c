"""Where in a unit the work is, as a worker's death would tell it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from mamba_dist.data.preparation.documents import Reading
from mamba_dist.data.preparation.parts import PartSettings, make_part, place_in_unit
from mamba_dist.data.preparation.sources import DiscoveryOptions, Unit, cut_units, discover
from mamba_dist.data.tokenization import FlatIds, Tokenizer, load_tokenizer


class Mortal:
    """Encodes as the tokenizer does, and dies of one text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        if "FATAL" in texts:
            raise MemoryError
        return self._tokenizer.encode_flat(texts)


def unit_of(folder: Path) -> Unit:
    """One unit of two files, the fifth document of the second fatal."""
    for name, fatal in (("a", None), ("b", 4)):
        texts = ["FATAL" if number == fatal else f"{name} {number}" for number in range(6)]
        lines = [json.dumps({"text": text}) for text in texts]
        lines.insert(2, "")  # a line that is no document
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    [unit] = cut_units(discover([folder], DiscoveryOptions()).files, unit_bytes=1 << 20)
    return unit


@pytest.mark.parametrize(
    ("documents", "place"),
    [
        (1, "at {b}:6"),
        (4, "between {b}:4 and {b}:7"),
        (9, "between {b}:5 and {b}:7"),
        (1000, "between {a}:1 and {b}:7"),
    ],
)
def test_the_documents_that_were_being_encoded_are_named(
    tokenizer_path: Path, tmp_path: Path, documents: int, place: str
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    unit = unit_of(corpus)
    tokenizer = load_tokenizer(tokenizer_path)
    settings = PartSettings(
        folder=str(tmp_path),
        tokenizer=str(tokenizer_path),
        eos_token=tokenizer.eos_token,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        dtype="uint16",
        reading=Reading("text"),
        train_split=0.9,
        batch_documents=documents,
        backend="reference",
        max_bad=0,
    )
    notes: list[tuple[int, ...]] = []
    with pytest.raises(MemoryError):
        make_part(unit, settings, encoder=Mortal(tokenizer), note=lambda *at: notes.append(at))
    paths = {name: corpus / f"{name}.jsonl" for name in "ab"}
    assert place_in_unit(unit, notes[-1]) == place.format(**paths)
    assert list(tmp_path.glob(".unit*")) == []


def test_a_place_between_documents_is_said_too(tmp_path: Path) -> None:
    unit = unit_of(tmp_path)
    second = tmp_path / "b.jsonl"
    assert place_in_unit(unit, (0, 0, 0, 0)).startswith("at the beginning of the 2 files ")
    assert place_in_unit(unit, (2, 0, 0, 0)) == f"reading {second}"
    assert place_in_unit(unit, (2, 5, 0, 0)) == f"reading {second} after line 5"


def test_lines_of_a_later_piece_of_a_file_are_counted_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "four"}\n' * 10)
    units = cut_units(discover([tmp_path], DiscoveryOptions()).files, unit_bytes=90)
    assert len(units) == 2
    assert place_in_unit(units[1], (1, 2, 1, 2)) == f"at {tmp_path}/a.jsonl:7"
    assert place_in_unit(units[1], (1, 0, 0, 0)) == f"reading {tmp_path}/a.jsonl after line 5"
