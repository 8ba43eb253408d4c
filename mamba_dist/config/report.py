"""Problems of a config as lines to act on: file, dotted path, value found, what is expected."""

import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mamba_dist.config.schema import RunConfig
from mamba_dist.config.section import Section
from mamba_dist.errors import ConfigError

_SHOWN_LETTERS = 80
_FIELDS = "a mapping of its fields"


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one dotted path; an empty path means the whole file."""

    path: str
    message: str


def config_error(problems: Sequence[Problem], *, source: str) -> ConfigError:
    """All problems in one error, a line each; `source` is the file, if any, and opens each line."""
    lines = [": ".join(part for part in (source, p.path, p.message) if part) for p in problems]
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{source or 'config'} has {len(lines)} problems:\n  " + "\n  ".join(lines))


def found_instead(value: object, expected: str) -> str:
    """The sentence for a value that breaks its rule."""
    hint = ""
    if isinstance(value, float) and value.is_integer() and expected.startswith("an integer"):
        hint = f"; write {int(value)}"
    return f"found {shown(value)}, expected {expected}{hint}"


def shown(value: object) -> str:
    """`value` as a config file would have it, on one line and not too long."""
    if value is None or isinstance(value, bool | dict | list):
        text = json.dumps(value, default=str)
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "…"


def unknown_key(path: str, known: Sequence[str]) -> str:
    """The sentence for a key that nothing reads, with the nearest of the `known` dotted paths."""
    nearest = _nearest(path, known)
    if nearest is not None:
        return f"unknown key, did you mean {nearest}?"
    section = path.rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    if siblings:
        return f"unknown key; known here: {', '.join(siblings)}"
    sections = dict.fromkeys(k.partition(".")[0] for k in known)
    return f"unknown key; known sections: {', '.join(sections)}"


def _nearest(path: str, known: Sequence[str]) -> str | None:
    section, _, name = path.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for candidate in known:
        by_name.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    if name in by_name:
        return by_name[name][0]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"{section}.{close[0]}" if section else close[0]
    # In other sections only nearly equal names: a far guess misleads more than the siblings do.
    if close := difflib.get_close_matches(name, by_name, n=1, cutoff=0.85):
        return by_name[close[0]][0]
    return None


def section_models() -> dict[str, type[Section]]:
    """The model of each section of the current schema, in its order."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def known_paths() -> list[str]:
    """Every dotted path of the current schema: sections first, then their fields."""
    sections = section_models()
    fields = [f"{name}.{f}" for name, model in sections.items() for f in model.model_fields]
    return [*RunConfig.model_fields, *fields]


def schema_problems(error: ValidationError) -> list[Problem]:
    """What pydantic found in a RunConfig, one problem per dotted path, in the file's order."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        location = _location(detail["loc"])
        path = ".".join(location)
        kind = detail["type"]
        if kind == "value_error":
            message = str(detail["ctx"]["error"])
        elif kind in ("extra_forbidden", "invalid_key"):
            message = unknown_key(path, _known_beside(location))
        elif kind == "missing" and len(location) == 1:
            message = "missing; every config has this section"
        elif kind == "missing":
            message = f"missing, expected {_expectation(location)}"
        else:
            message = found_instead(detail["input"], _expectation(location))
        problems.setdefault(path, Problem(path, message))
    return list(problems.values())


def _location(parts: Sequence[int | str]) -> tuple[str, ...]:
    """Where a problem is, as the user would name it: section, field, and the entry of a list."""
    named = tuple(str(part) for part in parts)
    # Beyond the field itself a union reports each of its members one level deeper.
    return named[:4] if len(named) > 2 and _entry_model(named) is not None else named[:2]


def _entry_model(location: tuple[str, ...]) -> type[Section] | None:
    """The model of the entries of the list at `section.field`, if they are mappings."""
    section, name = location[:2]
    return _entry(section_models()[section].model_fields[name].annotation)


def _entry(annotation: Any) -> type[Section] | None:
    entry = (typing.get_args(annotation) or (None,))[0]
    return entry if isinstance(entry, type) and issubclass(entry, Section) else None


def _known_beside(location: tuple[str, ...]) -> list[str]:
    if len(location) < 4 or (model := _entry_model(location)) is None:
        return known_paths()
    return [".".join([*location[:3], name]) for name in model.model_fields]


def _expectation(location: tuple[str, ...]) -> str:
    section, *rest = location
    field = RunConfig.model_fields[section]
    if rest:
        field = section_models()[section].model_fields[rest[0]]
    entries = _entry_model(location) if len(rest) > 1 else None
    if entries is not None:
        return expectation(entries.model_fields[rest[2]]) if len(rest) > 2 else _FIELDS
    return expectation(field)


def expectation(field: FieldInfo) -> str:
    """What a schema field accepts, in words: 'an integer from 1 to 65536 or null'."""
    annotation = field.annotation
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    return " or ".join(_member(member, field.metadata) for member in members)


def _member(member: Any, bounds: Iterable[object]) -> str:
    if typing.get_origin(member) is Literal:
        values = [shown(value) for value in typing.get_args(member)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if typing.get_origin(member) is tuple:
        entry = typing.get_args(member)[0]
        return f"a list, each entry {_member(entry, ())}"
    names = {bool: "true or false", str: "text", type(None): "null"}
    if member in names:
        return names[member]
    if isinstance(member, type) and issubclass(member, Section):
        return _FIELDS
    noun = "an integer" if member is int else "a number"
    return " ".join([noun, *_range(bounds)])


def _range(bounds: Iterable[object]) -> list[str]:
    low, high = "", ""
    inclusive = False
    for bound in bounds:
        match bound:
            case annotated_types.Ge(ge=value):
                low, inclusive = str(value), True
            case annotated_types.Gt(gt=value):
                low = f"above {value}"
            case annotated_types.Le(le=value):
                high = str(value)
            case annotated_types.Lt(lt=value):
                high = f"below {value}"
            case _:
                raise AssertionError(f"a bound without words: {bound}")
    if inclusive and high and not high.startswith("below"):
        return [f"from {low} to {high}"]
    low = f"of at least {low}" if inclusive else low
    high = high if not high or high.startswith("below") else f"at most {high}"
    return [" and ".join(part for part in (low, high) if part)] if low or high else []
