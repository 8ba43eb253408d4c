"""Version 1 files: fields arrive under their new names and are checked under their old ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import RunConfig, create_default_config, load_config
from mamba_dist.config.migrate import Migration, migrate
from mamba_dist.config.report import Problem

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]

# Path in version 1, its default, another value; path in version 2, the default and the value there.
FIELDS: list[tuple[str, Any, Any, str, Any, Any]] = [
    ("model.d_model", 2048, 64, "model.d_model", 2048, 64),
    ("model.d_state", 16, 8, "model.d_state", 16, 8),
    ("model.d_conv", 4, 3, "model.d_conv", 4, 3),
    ("model.expand", 2, 4, "model.expand", 2, 4),
    ("model.n_layers", 24, 2, "model.n_layers", 24, 2),
    ("model.vocab_size", 50280, 512, "model.vocab_size", 50280, 512),
    ("model.pad_token_id", 0, 7, "model.pad_token_id", 0, 7),
    ("training.batch_size", 32, 6, "training.micro_batch_size", 32, 6),
    (
        "training.gradient_accumulation_steps",
        4,
        3,
        "training.gradient_accumulation_steps",
        4,
        3,
    ),
    ("training.learning_rate", 1e-4, 3e-4, "training.learning_rate", 1e-4, 3e-4),
    ("training.weight_decay", 0.1, 0, "training.weight_decay", 0.1, 0),
    ("training.max_grad_norm", 1.0, 0.5, "training.max_grad_norm", 1.0, 0.5),
    ("training.num_epochs", 3, 1, "training.num_epochs", 3, 1),
    ("training.warmup_steps", 1000, 10, "training.warmup_steps", 1000, 10),
    ("training.save_steps", 1000, 20, "checkpoint.save_steps", 1000, 20),
    ("training.eval_steps", 500, 30, "training.eval_steps", 500, 30),
    ("training.use_mixed_precision", True, False, "training.precision", "bf16", "fp32"),
    (
        "training.gradient_checkpointing",
        False,
        True,
        "training.activation_checkpointing",
        "none",
        "full",
    ),
    ("data.max_seq_length", 2048, 512, "data.sequence_length", 2048, 512),
    ("data.tokenizer_path", "tokenizer.model", "t.json", "data.tokenizer_path", None, "t.json"),
    ("data.dataset_path", "data/", "corpus", "data.dataset_path", "data/", "corpus"),
    ("data.num_workers", 4, 0, "data.num_workers", 4, 0),
    ("data.preprocessing_batch_size", 1000, 50, "data.tokenize_batch_documents", 1000, 50),
    ("data.train_split", 0.9, 0.8, "data.train_split", 0.9, 0.8),
    ("data.val_split", 0.1, 0.2, "data.val_split", 0.1, 0.2),
    ("data.shuffle_data", True, False, "data.shuffle", True, False),
]
FIELDS = [
    (old, d1, v, new, "tokenizer.model" if d2 is None else d2, w)
    for old, d1, v, new, d2, w in FIELDS
]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {"model": {}, "training": {}, "data": {}}
    for path, value in values.items():
        section, name = path.split(".")
        document[section][name] = value
    return document


def value_at(config: RunConfig, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def written(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("name", ["old.yaml", "old.json"])
def test_every_field_of_version_1_arrives_from_yaml_and_json(
    write_config: WriteConfig, name: str
) -> None:
    loaded = load_config(write_config(nested({old: v for old, _, v, *_ in FIELDS}), name))
    assert {new: value_at(loaded.config, new) for *_, new, _, _ in FIELDS} == {
        new: value for *_, new, _, value in FIELDS
    }
    assert loaded.config.schema_version == 2


@pytest.mark.parametrize(
    ("old", "value", "new", "value_2"), [(f[0], f[2], f[3], f[5]) for f in FIELDS]
)
def test_the_account_says_what_a_field_became(
    write_config: WriteConfig, old: str, value: object, new: str, value_2: object
) -> None:
    values = {old: value}
    # The two shares sum to 1 only together.
    values |= {"data.train_split": 0.8, "data.val_split": 0.2} if old.endswith("_split") else {}
    account = load_config(write_config(nested(values))).account
    became = "stays" if old == new else f"is now {new} {written(value_2)}"
    assert f"  {old} {written(value)} {became}" in account


@pytest.mark.parametrize(("new", "default"), [(f[3], f[4]) for f in FIELDS])
def test_a_field_that_the_file_lacks_has_the_default_of_version_1_and_is_named(
    write_config: WriteConfig, new: str, default: object
) -> None:
    loaded = load_config(write_config({"model": {}}))
    assert value_at(loaded.config, new) == default
    (line,) = [line for line in loaded.account if "default of version 1: " in line]
    assert f"{new} {written(default)}" in line.split("version 1: ")[1].split(", ")


def test_a_field_of_the_file_is_not_called_a_default(write_config: WriteConfig) -> None:
    account = load_config(write_config(nested({f[0]: f[1] for f in FIELDS}))).account
    assert not [line for line in account if "default of version 1" in line]
    assert len(account) == 1 + len(FIELDS) + 1


def test_the_account_opens_with_the_file_and_the_versions(write_config: WriteConfig) -> None:
    path = write_config({"data": {}}, "old.json")
    assert load_config(path).account[0] == f"{path}: schema version 1 -> 2:"


def test_the_account_names_the_global_batch_of_1_2_4_and_8_ranks(write_config: WriteConfig) -> None:
    values = {"training.batch_size": 6, "training.gradient_accumulation_steps": 3}
    account = load_config(write_config(nested(values))).account
    assert any(
        line.startswith(
            "  an optimizer step takes 6 * 3 * ranks sequences: 18, 36, 72, 144 on 1, 2, 4, 8"
        )
        for line in account
    )


@pytest.mark.parametrize("section", ["model", "training", "data"])
def test_any_one_section_makes_a_file_version_1(write_config: WriteConfig, section: str) -> None:
    assert load_config(write_config({section: {}})).config == create_default_config().model_copy(
        update={
            "training": create_default_config().training.model_copy(update={"run_dir": "runs/run"})
        }
    )


def test_a_file_may_say_that_it_is_version_1(write_config: WriteConfig) -> None:
    path = write_config({"schema_version": 1, "training": {"batch_size": 2}})
    assert load_config(path).config.training.micro_batch_size == 2


def test_the_default_config_is_an_empty_version_1() -> None:
    config = create_default_config()
    assert {new: value_at(config, new) for *_, new, _, _ in FIELDS} == {f[3]: f[4] for f in FIELDS}
    assert config.training.run_dir is None
    assert config.training.global_batch_size is None
    assert config.training.max_steps is None


BAD = [
    ("model.d_model", 7, "an integer from 8 to 65536"),
    ("model.d_state", 0, "an integer from 1 to 1024"),
    ("model.d_conv", 17, "an integer from 2 to 16"),
    ("model.expand", 0, "an integer from 1 to 16"),
    ("model.n_layers", "24", "an integer from 1 to 1024"),
    ("model.vocab_size", 1, "an integer from 2 to 2147483647"),
    ("model.pad_token_id", -1, "an integer of at least 0"),
    ("training.batch_size", 0, "an integer from 1 to 65536"),
    ("training.gradient_accumulation_steps", 0, "an integer from 1 to 65536 or null"),
    ("training.learning_rate", "fast", "a number above 0 and at most 10"),
    ("training.weight_decay", -1, "a number from 0 to 10"),
    ("training.max_grad_norm", 0, "a number above 0 or null"),
    ("training.num_epochs", 0, "an integer of at least 1 or null"),
    ("training.warmup_steps", -1, "an integer of at least 0"),
    ("training.save_steps", 0, "an integer of at least 1"),
    ("training.eval_steps", 0, "an integer of at least 1 or null"),
    ("training.use_mixed_precision", "bf16", "true or false"),
    ("training.gradient_checkpointing", 1, "true or false"),
    ("data.max_seq_length", 0, "an integer from 1 to 16777216"),
    ("data.tokenizer_path", 3, "text"),
    ("data.dataset_path", 3, "text or null"),
    ("data.num_workers", 257, "an integer from 0 to 256"),
    ("data.preprocessing_batch_size", 0, "an integer from 1 to 1000000"),
    ("data.train_split", 1, "a number above 0 and below 1"),
    ("data.val_split", 0, "a number above 0 and below 1"),
    ("data.shuffle_data", 2, "true or false"),
]


def test_the_table_of_bad_values_has_every_field() -> None:
    assert [path for path, *_ in BAD] == [path for path, *_ in FIELDS]


@pytest.mark.parametrize(("path", "value", "expected"), BAD)
def test_a_bad_value_is_reported_under_the_name_of_version_1(
    problems: Problems, path: str, value: object, expected: str
) -> None:
    assert problems(nested({path: value})) == [f"{path}: found {value!r}, expected {expected}"]


@pytest.mark.parametrize(("path", "default"), [(f[0], f[1]) for f in FIELDS])
def test_null_was_never_a_value_of_version_1(
    problems: Problems, path: str, default: object
) -> None:
    switches = ("training.use_mixed_precision", "training.gradient_checkpointing")
    value = f"a value; without the line it is {written(default)}"
    expected = "true or false" if path in switches else value
    assert problems(nested({path: None})) == [f"{path}: found null, expected {expected}"]


def test_all_problems_of_a_version_1_file_are_listed_at_once(problems: Problems) -> None:
    lines = problems(
        {
            "model": {"d_modle": 64, "n_layers": 0},
            "training": {"batch_size": 0, "use_mixed_precision": None},
            "data": {"max_seq_length": 0},
        }
    )
    assert [line.split(":")[0] for line in lines] == [
        "model.d_modle",
        "training.use_mixed_precision",
        "model.n_layers",
        "training.batch_size",
        "data.max_seq_length",
    ]


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            {"training": {"batchsize": 3}},
            "training.batchsize: unknown key, did you mean training.batch_size? "
            "(a file without schema_version is of version 1)",
        ),
        (
            {"training": {"d_model": 3}},
            "training.d_model: unknown key, did you mean model.d_model? "
            "(a file without schema_version is of version 1)",
        ),
        (
            {"model": {}, "modle": {}},
            "modle: unknown key, did you mean model? "
            "(a file without schema_version is of version 1)",
        ),
        (
            {"data": {"zzz": 1}},
            "data.zzz: unknown key; known here: max_seq_length, tokenizer_path, dataset_path, "
            "num_workers, preprocessing_batch_size, train_split, val_split, shuffle_data "
            "(a file without schema_version is of version 1)",
        ),
        (
            {"training": {"micro_batch_size": 3}},
            "training.micro_batch_size: belongs to schema version 2; "
            "a file of that version begins with schema_version: 2",
        ),
        (
            {"model": {}, "engine": {}},
            "engine: belongs to schema version 2; "
            "a file of that version begins with schema_version: 2",
        ),
        ({"model": None}, "model: found null, expected a mapping of its fields"),
        ({"training": [1]}, "training: found [1], expected a mapping of its fields"),
    ],
)
def test_a_key_that_version_1_did_not_have_is_refused(
    problems: Problems, document: dict[str, Any], line: str
) -> None:
    assert problems(document) == [line]


def test_rules_between_fields_hold_for_version_1(problems: Problems) -> None:
    assert problems({"data": {"train_split": 0.8}}) == [
        "data: train_split 0.8 + val_split 0.1 = 0.9, expected a sum of 1"
    ]


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            {"schema_version": 3, "training": {}},
            "schema_version: found 3, which a newer mamba-dist wrote; "
            "this one reads versions up to 2: update mamba-dist",
        ),
        ({"schema_version": 0}, "schema_version: found 0, expected an integer from 1 to 2"),
        ({"schema_version": "2"}, "schema_version: found '2', expected an integer from 1 to 2"),
        ({"schema_version": True}, "schema_version: found true, expected an integer from 1 to 2"),
        ({"schema_version": None}, "schema_version: found null, expected an integer from 1 to 2"),
        (
            {"Model": {}, "engine": {}},
            "found no schema_version and only 'Model', 'engine'; a config begins with "
            "schema_version: 2 and has the section training",
        ),
    ],
)
def test_a_version_that_cannot_be_read_is_refused_by_name(
    problems: Problems, document: dict[str, Any], line: str
) -> None:
    assert problems(document) == [line]


def test_a_current_file_is_taken_as_it_is(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    assert load_config(write_config(minimal)).account == ()
    assert migrate(minimal, version=2) == Migration(minimal)


def test_steps_chain_and_paths_keep_the_name_that_stands_in_the_file() -> None:
    def second(old: dict[str, Any]) -> Migration:
        assert old == {"at": 2}
        wrong = (Problem("two", "2"),)
        return Migration({"at": 3}, ("b changed",), wrong, {"d": "b", "z": "y"})

    def first(old: dict[str, Any]) -> Migration:
        assert old == {"at": 1}
        wrong = (Problem("one", "1"),)
        return Migration({"at": 2}, ("a changed",), wrong, {"b": "a", "c": "k"})

    assert migrate({"at": 1}, version=1, steps={1: first, 2: second}) == Migration(
        {"at": 3},
        ("schema version 1 -> 2:", "  a changed", "schema version 2 -> 3:", "  b changed"),
        (Problem("one", "1"), Problem("two", "2")),
        {"d": "a", "c": "k", "z": "y"},
    )


def test_a_step_leaves_the_document_it_was_given_alone() -> None:
    document = {"training": {"batch_size": 2}}
    migrate(document, version=1)
    assert document == {"training": {"batch_size": 2}}
