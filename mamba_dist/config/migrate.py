"""Older schema versions to the current one: one pure function per step, and the table of them.

Version 1 is a file without `schema_version` with any of the sections model, training, data. What it
leaves out has the default of version 1, not of today, so an old file keeps meaning what it meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mamba_dist.config.report import Problem, found_instead, known_paths, shown, unknown_key
from mamba_dist.config.schema import SCHEMA_VERSION
from mamba_dist.config.text import Document

_SECTIONS_1 = ("model", "training", "data")
_RANKS_NAMED = (1, 2, 4, 8)


@dataclass(frozen=True)
class Migration:
    """A document in a newer version, and what happened on the way."""

    document: Document
    account: tuple[str, ...] = ()
    """One line for each change."""
    problems: tuple[Problem, ...] = ()
    """What could not be carried over; the default of the old version stands there instead."""
    written_as: Mapping[str, str] = field(default_factory=dict)
    """Dotted path in the new version -> the one that the file uses, where they differ."""


Step = Callable[[Document], Migration]


@dataclass(frozen=True)
class _Field1:
    """A field of version 1: its dotted path, its default, its dotted path in version 2."""

    path: str
    default: object
    path_2: str
    words: Mapping[bool, str] | None = None
    """What true and false became, where version 2 has names instead."""


FIELDS_1: tuple[_Field1, ...] = (
    _Field1("model.d_model", 2048, "model.d_model"),
    _Field1("model.d_state", 16, "model.d_state"),
    _Field1("model.d_conv", 4, "model.d_conv"),
    _Field1("model.expand", 2, "model.expand"),
    _Field1("model.n_layers", 24, "model.n_layers"),
    _Field1("model.vocab_size", 50280, "model.vocab_size"),
    _Field1("model.pad_token_id", 0, "model.pad_token_id"),
    _Field1("training.batch_size", 32, "training.micro_batch_size"),
    _Field1("training.gradient_accumulation_steps", 4, "training.gradient_accumulation_steps"),
    _Field1("training.learning_rate", 1e-4, "training.learning_rate"),
    _Field1("training.weight_decay", 0.1, "training.weight_decay"),
    _Field1("training.max_grad_norm", 1.0, "training.max_grad_norm"),
    _Field1("training.num_epochs", 3, "training.num_epochs"),
    _Field1("training.warmup_steps", 1000, "training.warmup_steps"),
    _Field1("training.save_steps", 1000, "checkpoint.save_steps"),
    _Field1("training.eval_steps", 500, "training.eval_steps"),
    _Field1(
        "training.use_mixed_precision", True, "training.precision", {True: "bf16", False: "fp32"}
    ),
    _Field1(
        "training.gradient_checkpointing",
        False,
        "training.activation_checkpointing",
        {True: "full", False: "none"},
    ),
    _Field1("data.max_seq_length", 2048, "data.sequence_length"),
    _Field1("data.tokenizer_path", "tokenizer.model", "data.tokenizer_path"),
    _Field1("data.dataset_path", "data/", "data.dataset_path"),
    _Field1("data.num_workers", 4, "data.num_workers"),
    _Field1("data.preprocessing_batch_size", 1000, "data.tokenize_batch_documents"),
    _Field1("data.train_split", 0.9, "data.train_split"),
    _Field1("data.val_split", 0.1, "data.val_split"),
    _Field1("data.shuffle_data", True, "data.shuffle"),
)


def upgrade_1_to_2(old: Document) -> Migration:
    """A version 1 document as version 2, every field of version 1 written out."""
    new: Document = {"schema_version": 2, "model": {}, "training": {}, "data": {}, "checkpoint": {}}
    sections, problems = _read_sections_1(old)
    moved: list[str] = []
    defaulted: list[str] = []
    for one in FIELDS_1:
        section, name = one.path.split(".")
        given = name in sections[section]
        value = sections[section].get(name, one.default)
        if (wrong := _problem_1(one, value)) is not None:
            problems.append(wrong)
            value = one.default
        value_2 = one.words[bool(value)] if one.words else value
        section_2, name_2 = one.path_2.split(".")
        new[section_2][name_2] = value_2
        if given:
            moved.append(_moved(one, value, value_2))
        else:
            defaulted.append(f"{one.path_2} {shown(value_2)}")
    account = [*moved, *_global_batch(new["training"])]
    if defaulted:
        account.append("not in the file, default of version 1: " + ", ".join(defaulted))
    renamed = {one.path_2: one.path for one in FIELDS_1 if one.path_2 != one.path}
    return Migration(new, tuple(account), tuple(problems), renamed)


STEPS: Mapping[int, Step] = {1: upgrade_1_to_2}
"""The step that leads away from each older version."""


def _read_sections_1(old: Document) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS_1}
    problems = []
    known = [*_SECTIONS_1, *(one.path for one in FIELDS_1)]
    for key, value in old.items():
        if key == "schema_version":
            continue
        if key not in sections:
            problems.append(Problem(str(key), _unknown_1(str(key), known)))
        elif not isinstance(value, dict):
            problems.append(Problem(key, found_instead(value, "a mapping of its fields")))
        else:
            sections[key] = value
            paths = [f"{key}.{name}" for name in value]
            problems += [Problem(p, _unknown_1(p, known)) for p in paths if p not in known]
    return sections, problems


def _unknown_1(path: str, known: list[str]) -> str:
    if path in known_paths():
        return "belongs to schema version 2; a file of that version begins with schema_version: 2"
    return f"{unknown_key(path, known)} (a file without schema_version is of version 1)"


def _problem_1(one: _Field1, value: object) -> Problem | None:
    # Ranges are checked by the current schema, where null means "off"; version 1 had no null.
    if one.words and not isinstance(value, bool):
        return Problem(one.path, found_instead(value, "true or false"))
    if value is None:
        expected = f"a value; without the line it is {shown(one.default)}"
        return Problem(one.path, found_instead(value, expected))
    return None


def _moved(one: _Field1, value: object, value_2: object) -> str:
    if one.path == one.path_2:
        return f"{one.path} {shown(value)} stays"
    return f"{one.path} {shown(value)} is now {one.path_2} {shown(value_2)}"


def _global_batch(training: Mapping[str, Any]) -> list[str]:
    micro, accumulation = training["micro_batch_size"], training["gradient_accumulation_steps"]
    if type(micro) is not int or type(accumulation) is not int:
        return []
    sizes = ", ".join(str(micro * accumulation * ranks) for ranks in _RANKS_NAMED)
    ranks = ", ".join(str(ranks) for ranks in _RANKS_NAMED)
    return [
        f"an optimizer step takes {micro} * {accumulation} * ranks sequences: "
        f"{sizes} on {ranks} ranks; training.global_batch_size would fix it for any number of ranks"
    ]


def version_of(document: Document) -> int | Problem:
    """The schema version of a parsed file, or why it has none that can be read."""
    if "schema_version" not in document:
        if any(section in document for section in _SECTIONS_1):
            return 1
        keys = ", ".join(shown(key) for key in document)
        return Problem(
            "",
            f"found no schema_version and only {keys}; a config begins with "
            f"schema_version: {SCHEMA_VERSION} and has the section training",
        )
    version = document["schema_version"]
    if type(version) is not int or version < 1:
        expected = f"an integer from 1 to {SCHEMA_VERSION}"
        return Problem("schema_version", found_instead(version, expected))
    if version > SCHEMA_VERSION:
        return Problem(
            "schema_version",
            f"found {version}, which a newer mamba-dist wrote; this one reads versions up to "
            f"{SCHEMA_VERSION}: update mamba-dist",
        )
    return version


def migrate(document: Document, *, version: int, steps: Mapping[int, Step] = STEPS) -> Migration:
    """`document` of `version` after all `steps` from there on; unchanged if there are none."""
    done = Migration(document)
    while (step := steps.get(version)) is not None:
        after = step(done.document)
        before = done.written_as
        # A path that an earlier step renamed keeps the name that stands in the file.
        written_as = {new: before.get(old, old) for new, old in after.written_as.items()}
        untouched = {
            new: old for new, old in before.items() if new not in after.written_as.values()
        }
        done = Migration(
            after.document,
            (
                *done.account,
                f"schema version {version} -> {version + 1}:",
                *_indented(after.account),
            ),
            (*done.problems, *after.problems),
            {**untouched, **written_as},
        )
        version += 1
    return done


def _indented(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"  {line}" for line in lines)
