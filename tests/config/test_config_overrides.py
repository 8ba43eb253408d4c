"""Overrides on the command line: their values, their rivals, their errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import load_config

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=3e-4", 3e-4),
        ("training.seed = 7", 7),
        ("training.max_grad_norm=null", None),
        ("training.precision=fp32", "fp32"),
        ("data.shuffle=false", False),
        ("data.dataset_path='a=b'", "a=b"),
        ("data.dataset_path=a=b", "a=b"),
        ("engine.zero_stage=3", 3),
        ("telemetry.tensorboard=no", False),
    ],
)
def test_an_override_is_read_like_a_line_of_the_file(
    write_config: WriteConfig, minimal: dict[str, Any], override: str, value: object
) -> None:
    loaded = load_config(write_config(minimal), [override])
    section, name = override.split("=")[0].strip().split(".")
    assert getattr(getattr(loaded.config, section), name) == value
    assert loaded.account == ()


def test_of_equal_overrides_the_last_wins(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    loaded = load_config(write_config(minimal), ["training.seed=1", "training.seed=2"])
    assert loaded.config.training.seed == 2


def test_an_override_makes_the_section_that_the_file_lacks(write_config: WriteConfig) -> None:
    path = write_config({"schema_version": 2, "model": {}})
    config = load_config(path, ["training.max_steps=9", "training.warmup_steps=1",
                                "training.gradient_accumulation_steps=2"]).config  # fmt: skip
    assert (config.training.max_steps, config.training.gradient_accumulation_steps) == (9, 2)


LENGTHS = ["num_epochs", "max_steps", "max_tokens"]
BATCHES = ["global_batch_size", "gradient_accumulation_steps"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [(a, b) for group in (LENGTHS, BATCHES) for a in group for b in group],
)
def test_an_override_of_a_length_or_batch_replaces_the_one_of_the_file(
    write_config: WriteConfig, given: str, chosen: str
) -> None:
    value = 10**9
    training: dict[str, Any] = {"micro_batch_size": 1, given: 64, "warmup_steps": 1}
    training |= {"gradient_accumulation_steps": 1} if given in LENGTHS else {"num_epochs": 1}
    value = 10**9 if chosen in LENGTHS else 128
    loaded = load_config(
        write_config({"schema_version": 2, "training": training}), [f"training.{chosen}={value}"]
    )
    group = LENGTHS if given in LENGTHS else BATCHES
    found = {name: getattr(loaded.config.training, name) for name in group}
    assert found == {name: value if name == chosen else None for name in group}
    replaced = [f"override training.{chosen}={value} replaces training.{given} 64"]
    assert list(loaded.account) == ([] if given == chosen else replaced)


def test_an_override_of_the_length_works_on_a_version_1_file(write_config: WriteConfig) -> None:
    overrides = ["training.max_steps=20", "training.warmup_steps=2"]
    loaded = load_config(write_config({"training": {"num_epochs": 5}}), overrides)
    assert (loaded.config.training.max_steps, loaded.config.training.num_epochs) == (20, None)
    assert loaded.account[-1] == "override training.max_steps=20 replaces training.num_epochs 5"


def test_null_clears_a_length_and_leaves_the_others(
    problems: Problems, write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    clear = "training.max_steps=null"
    (line,) = problems(minimal, clear)
    assert line == (
        "training: give exactly one of num_epochs, max_steps, max_tokens (how long the run is); "
        "found none of them"
    )
    config = load_config(write_config(minimal), ["training.max_tokens=null"]).config
    assert config.training.max_steps == 2000
    config = load_config(write_config(minimal), [clear, "training.num_epochs=2"]).config
    assert (config.training.max_steps, config.training.num_epochs) == (None, 2)


def test_two_lengths_by_override_contradict_each_other(
    problems: Problems, minimal: dict[str, Any]
) -> None:
    (line,) = problems(minimal, "training.max_tokens=1000000000", "training.num_epochs=3")
    assert line.endswith("found num_epochs and max_tokens")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.seed", "override 'training.seed': expected section.field=value"),
        (
            "training.seed=",
            "override 'training.seed=': has no value; write training.seed=null to clear the field",
        ),
        (
            "training.sead=1",
            "override 'training.sead=1': unknown key, did you mean training.seed?",
        ),
        ("d_model=1", "override 'd_model=1': unknown key, did you mean model.d_model?"),
        (
            "trainnig.eval_steps=1",
            "override 'trainnig.eval_steps=1': unknown key, did you mean training.eval_steps?",
        ),
        ("x.y.z=1", "override 'x.y.z=1': unknown key; known sections: "),
        (
            "training=1",
            "override 'training=1': names a section, expected one field of it, "
            "such as training.run_dir",
        ),
        (
            "schema_version=1",
            "override 'schema_version=1': unknown key; known sections: model, training, data, "
            "engine, checkpoint, telemetry",
        ),
        (
            "training.seed=[",
            "override 'training.seed=[': not valid YAML: line 1, column 2: ",
        ),
        (
            "training.seed=-1",
            "override training.seed: found -1, expected an integer of at least 0 and below",
        ),
        ("data.num_workers={a: 1}", 'override data.num_workers: found {"a": 1}, expected'),
    ],
)
def test_a_bad_override_is_named_as_such(
    problems: Problems, minimal: dict[str, Any], override: str, line: str
) -> None:
    (found,) = problems(minimal, override)
    assert found.startswith(line)


def test_problems_of_the_file_and_of_overrides_are_listed_together(
    problems: Problems, minimal: dict[str, Any]
) -> None:
    minimal["model"] = {"d_model": 0}
    found = problems(minimal, "foo", "training.seed=-1", "training.lr=2")
    assert [line.split(":")[0] for line in found] == [
        "override 'foo'",
        "override 'training.lr=2'",
        "model.d_model",
        "override training.seed",
    ]


def test_an_override_on_a_version_1_file_is_reported_under_the_name_that_was_typed(
    problems: Problems,
) -> None:
    (line,) = problems({"training": {"batch_size": 4}}, "training.micro_batch_size=0")
    assert (
        line == "override training.micro_batch_size: found 0, expected an integer from 1 to 65536"
    )


def test_an_override_mends_a_bad_value_of_the_file(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    minimal["training"]["seed"] = -1
    assert load_config(write_config(minimal), ["training.seed=1"]).config.training.seed == 1


def test_a_section_that_is_no_mapping_is_refused_whatever_the_overrides(problems: Problems) -> None:
    document = {"schema_version": 2, "training": 3}
    for overrides in ([], ["training.max_steps=3"]):
        assert problems(document, *overrides) == [
            "training: found 3, expected a mapping of its fields"
        ]
