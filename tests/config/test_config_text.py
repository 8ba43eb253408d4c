"""Config files as text: what values mean, what is refused, and that writing is exact."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.config.text import (
    parse_json,
    parse_yaml,
    read_document,
    write_document,
    write_text,
)
from mamba_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("-3E+4", -3e4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("+.5e1", 5.0),
        ("2.", 2.0),
        ("-.inf", -float("inf")),
        ("12", 12),
        ("-12", -12),
        ("+12", 12),
        ("1_400_000", 1_400_000),
        ("010", 10),
        ("0o14", 12),
        ("0xfF", 255),
        ("true", True),
        ("no", False),
        ("On", True),
        ("OFF", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e5x", "1e5x"),
        ("nullable", "nullable"),
        ("truer", "truer"),
        ("'3e-4'", "3e-4"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_a_plain_yaml_scalar_means_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert (type(found), found) == (type(value), value)


def test_anchors_and_merge_keys_work() -> None:
    text = "a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\nc: *base\n"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  d_model: 1\n  d_model: 2\n", r"line 3, column 3: key 'd_model' stands twice"),
        ("a: 1\nb: [\n", r"line 3, column 1: "),
        ("a: 1\n b: 2\n", r"line 2, column 3: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", r"line 2, column 1: "),
        ("a: !!python/name:os.system\n", r"line 1, column 4: could not determine a constructor"),
        ("a: " + "9" * 5000, "digits"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_broken_yaml_names_line_and_column(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^not valid YAML: .*{message}"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "line 1, column "),
        ('{"a": 1,\n "a": 2}', "key 'a' stands twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    ],
)
def test_broken_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^not valid JSON: .*{message}"):
        parse_json(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"", "is empty"),
        ("a.json", b" \n", "is empty"),
        ("a.yaml", b"# nothing\n", "holds no settings"),
        ("a.yaml", b"{}", "holds no settings"),
        ("a.yaml", b"- 1\n", "holds a list, expected a mapping"),
        ("a.json", b'"text"', "holds a str, expected a mapping"),
        ("a.yaml", b"a: \xff\n", "is not UTF-8 text: byte 3 is wrong"),
        ("a.yaml", b"a: [", "not valid YAML: line 1"),
        ("a.json", b"{", "not valid JSON: line 1"),
        ("a.toml", b"a = 1", "has suffix '.toml'; a config is a .yaml, .yml or .json file"),
        ("a", b"a: 1", "has no suffix; a config is a .yaml, .yml or .json file"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        read_document(tmp_path / "none.yaml")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml is a folder"):
        read_document(folder)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"loop\.yaml cannot be read: Too many levels"):
        read_document(path)


@pytest.mark.parametrize("name", ["a.yaml", "a.YML", "a.json"])
def test_a_byte_order_mark_and_any_case_of_the_suffix_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'\xef\xbb\xbf{"model": {"d_model": 8}}')
    assert read_document(path) == {"model": {"d_model": 8}}


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["a\x85b", "\u2028", "\u2029 a"])
    | st.sampled_from(
        ["1e5", "3e-4", "010", "yes", "null", "1_000", "0x1f", "<<", "2024-01-01", ""]
    )
)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@settings(deadline=None, derandomize=True)
@given(fields=st.dictionaries(st.text("abcdefgh_", min_size=1), scalars, min_size=1))
def test_whatever_is_written_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, fields: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round_trip{suffix}"
    write_document({"section": fields}, path)
    found = read_document(path)["section"]
    assert {k: (type(v), v) for k, v in found.items()} == {
        k: (type(v), v) for k, v in fields.items()
    }


def test_fields_are_written_in_their_order_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write_document({"z": {"b": 1e-5}, "a": {"path": "données/a"}}, path)
    assert path.read_text("utf-8") == "z:\n  b: 1.0e-05\na:\n  path: données/a\n"
    write_document({"z": {"b": 1}, "a": "é"}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text(
        "utf-8"
    ) == '{\n  "z": {\n    "b": 1\n  },\n  "a": "é"\n}\n'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    write_text("old\n", path)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be written: No space left on device"):
        write_text("new\n", path)
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_the_new_content_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    replace, fsync = os.replace, os.fsync

    def logged_replace(source: Path, target: Path) -> None:
        events.append(("rename", Path(source).read_text()))
        replace(source, target)

    def logged_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append((kind, str(os.fstat(descriptor).st_size) if kind == "file" else ""))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", logged_replace)
    monkeypatch.setattr(os, "fsync", logged_fsync)
    write_text("12345", tmp_path / "a.yaml")
    assert events == [("file", "5"), ("rename", "12345"), ("folder", "")]


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_a_config_is_not_written_under_an_unknown_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.yaml, \.yml or \.json"):
        write_document({"a": 1}, tmp_path / name)
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        write_document({"a": 1}, tmp_path / "none" / "a.yaml")


def test_json_is_written_as_json(tmp_path: Path) -> None:
    write_document({"a": {"b": None}}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": {"b": None}}
