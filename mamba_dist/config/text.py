"""Config files as text: YAML and JSON to plain values and back, chosen by the suffix.

YAML is read by the scalar rules of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3.2): `3e-4`
is a number, `010` is ten, `1:30` and `2024-01-01` are text. Two rules of YAML 1.1 stay, as files
written for PyYAML use them: yes, no, on, off are booleans, and integers may hold underscores. A key
that stands twice is refused in both formats, which leave it open which one would win.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from mamba_dist.errors import ConfigError

Document = dict[str, Any]
"""A parsed config file before validation."""

YAML_SUFFIXES = (".yaml", ".yml")
JSON_SUFFIXES = (".json",)

_TAG = "tag:yaml.org,2002:"
# Tried in this order, so a plain integer never becomes a float.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "bool",
        r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
        list("tTfFyYnNoO"),
    ),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_letters in _SCALARS:
        for letter in first_letters:
            table.setdefault(letter, []).append((_TAG + name, re.compile(f"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return node


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


_Loader.add_constructor(_TAG + "int", _construct_int)


class _Dumper(yaml.SafeDumper):
    # The rules of the loader, so that the text "1e5" is quoted and comes back as text.
    yaml_implicit_resolvers = _resolvers()


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML loses these line breaks of Unicode unless they are escaped, which needs double quotes.
    style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def parse_yaml(text: str) -> Any:
    """The value that YAML `text` stands for.

    Raises:
        ConfigError: the text is not one YAML document; names line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"not valid YAML: {place}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {reason}") from error


def parse_json(text: str) -> Any:
    """The value that JSON `text` stands for.

    Raises:
        ConfigError: the text is not one JSON value (NaN is none); names line and column.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"not valid JSON: {place}: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def read_document(path: Path) -> Document:
    """The mapping that the file `path` holds.

    Raises:
        ConfigError: the file cannot be read, is of another kind, broken, empty, or not a mapping.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .yaml, .yml or .json file")
    suffix = known_suffix(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from error
    if not text.strip():
        raise ConfigError(f"{path} is empty; configs/quickstart.yaml is an example")
    try:
        value = parse_json(text) if suffix in JSON_SUFFIXES else parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if value is None or value == {}:
        raise ConfigError(f"{path} holds no settings; configs/quickstart.yaml is an example")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a {type(value).__name__}, expected a mapping of sections "
            "such as model, training, data"
        )
    return value


def write_document(document: Document, path: Path) -> None:
    """Writes the mapping to `path`, whole or not at all: a temporary file, fsync, rename, fsync.

    Raises:
        ConfigError: the suffix is unknown or the file cannot be written.
    """
    if known_suffix(path) in JSON_SUFFIXES:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    else:
        text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(text, path)


def write_text(text: str, path: Path) -> None:
    """Replaces the file `path` by `text` in one step.

    Raises:
        ConfigError: the file cannot be written; an older one stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def known_suffix(path: Path) -> str:
    """The suffix of `path` in lower case.

    Raises:
        ConfigError: it is none of the config formats.
    """
    suffix = path.suffix.lower()
    if suffix not in YAML_SUFFIXES + JSON_SUFFIXES:
        found = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ConfigError(f"{path} has {found}; a config is a .yaml, .yml or .json file")
    return suffix
