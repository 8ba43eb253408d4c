"""Dotted overrides: `training.learning_rate=3e-4` replaces one field of a parsed config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba_dist.config.report import Problem, known_paths, section_models, shown, unknown_key
from mamba_dist.config.text import Document, parse_yaml
from mamba_dist.errors import ConfigError

_EXACTLY_ONE_OF = (
    ("training.global_batch_size", "training.gradient_accumulation_steps"),
    ("training.num_epochs", "training.max_steps", "training.max_tokens"),
    ("data.dataset_path", "data.sources"),
)


@dataclass(frozen=True)
class Overridden:
    """A document after its overrides."""

    document: Document
    account: tuple[str, ...]
    """One line for each value of the file that an override cleared."""
    problems: tuple[Problem, ...]
    paths: frozenset[str]
    """Dotted paths whose value now comes from an override."""


def apply_overrides(document: Document, overrides: Sequence[str]) -> Overridden:
    """A copy of `document` with each `section.field=value` in its place.

    The value is read by the rules of YAML; the last of equal paths wins. An override of a field of
    which exactly one may be given (a batch, a length) clears the others that the file gives; two
    such overrides stay, and the schema refuses them.
    """
    values: dict[str, Any] = {}
    problems = []
    for text in overrides:
        parsed = _parse(text)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        else:
            values[parsed[0]] = parsed[1]
    copy = {key: dict(v) if isinstance(v, dict) else v for key, v in document.items()}
    for path, value in values.items():
        section, name = path.split(".")
        # A section that is no mapping is left for the schema to refuse.
        if isinstance(fields := copy.setdefault(section, {}), dict):
            fields[name] = value
    account = _clear_rivals(copy, values)
    return Overridden(copy, tuple(account), tuple(problems), frozenset(values))


def _clear_rivals(document: Document, values: dict[str, Any]) -> list[str]:
    account = []
    for path, value in values.items():
        group = next((g for g in _EXACTLY_ONE_OF if path in g), ())
        for rival in group:
            section, name = rival.split(".")
            fields = document[section]
            if value is None or rival in values or not isinstance(fields, dict):
                continue
            if (cleared := fields.pop(name, None)) is not None:
                account.append(f"override {path}={shown(value)} replaces {rival} {shown(cleared)}")
    return account


def _parse(text: str) -> tuple[str, Any] | Problem:
    path, equals, value_text = text.partition("=")
    path = path.strip()
    where = f"override {text!r}"
    if not equals:
        return Problem(where, "expected section.field=value")
    fields = [known for known in known_paths() if "." in known]
    if path not in fields:
        reason = (
            f"names a section, expected one field of it, such as {_first_field(path)}"
            if path in section_models()
            else unknown_key(path, fields)
        )
        return Problem(where, reason)
    if not value_text.strip():
        return Problem(where, f"has no value; write {path}=null to clear the field")
    try:
        return path, parse_yaml(value_text)
    except ConfigError as error:
        return Problem(where, str(error))


def _first_field(section: str) -> str:
    return next(known for known in known_paths() if known.startswith(f"{section}."))
