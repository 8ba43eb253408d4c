import json
from pathlib import Path

import pytest

from mamba_dist.data.preparation.documents import Reading
from mamba_dist.data.preparation.source_ids import check_has_ids
from mamba_dist.data.preparation.sources import DiscoveryOptions, discover
from mamba_dist.errors import DataError

READING = Reading("text", id_field="key")


def write(path: Path, rows: int, **more: object) -> None:
    path.write_text("\n".join(json.dumps({"text": "x", **more}) for _ in range(rows)))


def test_an_id_in_any_file_is_enough_and_none_in_all_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 1500)
    (tmp_path / "b.txt").write_text("a text")
    files = discover([tmp_path], DiscoveryOptions()).files
    with pytest.raises(DataError, match=r"in the field 'key', of 1,000 looked at, .*--id-field"):
        check_has_ids(files, READING)
    write(tmp_path / "c.jsonl", 1, key=7)
    check_has_ids(discover([tmp_path], DiscoveryOptions()).files, READING)


def test_texts_alone_which_have_no_ids_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    files = discover([tmp_path], DiscoveryOptions()).files
    with pytest.raises(DataError, match=r"has the field 'key': each file is one text.*--id-field"):
        check_has_ids(files, READING)


def test_without_documents_there_is_nothing_to_say_of_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"body": "x"}\n')
    check_has_ids(discover([tmp_path], DiscoveryOptions()).files, READING)
