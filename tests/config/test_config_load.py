"""Loading and saving whole files: errors that list everything, defaults, round trips, imports."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_dist.config import (
    ConfigLoader,
    MambaConfig,
    RunConfig,
    TrainingConfig,
    create_default_config,
    load_config,
)
from mamba_dist.errors import ConfigError

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]


def test_a_run_folder_is_named_after_the_file(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    assert load_config(write_config(minimal, "small.yaml")).config.training.run_dir == "runs/small"
    minimal["training"]["run_dir"] = None
    assert load_config(write_config(minimal, "b.c.json")).config.training.run_dir == "runs/b.c"


def test_a_run_folder_that_is_given_stays(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    path = write_config(minimal)
    assert load_config(path, ["training.run_dir=/x"]).config.training.run_dir == "/x"
    minimal["training"]["run_dir"] = "elsewhere"
    assert load_config(write_config(minimal)).config.training.run_dir == "elsewhere"


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json"])
def test_a_saved_config_is_loaded_equal(tmp_path: Path, name: str) -> None:
    config = create_default_config()
    ConfigLoader.save_to_file(config, str(tmp_path / name))
    assert ConfigLoader.load_from_file(str(tmp_path / name)) == config
    assert (tmp_path / name).read_text().lstrip('{ \n"').startswith("schema_version")


@settings(deadline=None, derandomize=True)
@given(
    model=st.builds(
        MambaConfig,
        d_model=st.integers(8, 65536),
        dt_rank=st.just("auto") | st.integers(1, 8),
        norm_eps=st.floats(1e-300, 0.1),
        layer=st.just("mamba1"),
    ),
    training=st.builds(
        TrainingConfig,
        run_dir=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
        global_batch_size=st.none(),
        gradient_accumulation_steps=st.integers(1, 65536),
        micro_batch_size=st.integers(1, 65536),
        num_epochs=st.integers(1),
        learning_rate=st.floats(0, 10, exclude_min=True),
        max_grad_norm=st.none() | st.floats(1e-300, 1e300),
        seed=st.integers(0, 2**63 - 1),
    ),
    suffix=st.sampled_from([".yaml", ".json"]),
)
def test_any_valid_config_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    model: MambaConfig,
    training: TrainingConfig,
    suffix: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    config = RunConfig(model=model, training=training)
    ConfigLoader.save_to_file(config, path)
    assert ConfigLoader.load_from_file(path) == config


def test_loading_an_old_file_logs_the_account(
    write_config: WriteConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config({"training": {"batch_size": 6}})
    with caplog.at_level(logging.WARNING):
        ConfigLoader.load_from_file(path)
    assert "training.batch_size 6 is now training.micro_batch_size 6" in caplog.text
    caplog.clear()
    ConfigLoader.save_to_file(create_default_config(), path)
    ConfigLoader.load_from_file(path)
    assert caplog.text == ""


def test_one_problem_is_one_line(write_config: WriteConfig, minimal: dict[str, Any]) -> None:
    minimal["data"] = {"num_workers": 999}
    path = write_config(minimal)
    with pytest.raises(ConfigError) as caught:
        ConfigLoader.load_from_file(path)
    assert str(caught.value) == (
        f"{path}: data.num_workers: found 999, expected an integer from 0 to 256"
    )


def test_all_problems_are_listed_one_a_line(problems: Problems) -> None:
    lines = problems(
        {
            "schema_version": 2,
            "modle": {},
            "model": {"d_modle": 3, "dt_rank": "some", "layer": "x"},
            "training": {"max_steps": 5},
            "data": {"train_split": 0.5},
            "engine": None,
        }
    )
    assert sorted(line.split(": ")[0] for line in lines) == [
        "data",
        "engine",
        "model.d_modle",
        "model.dt_rank",
        "model.layer",
        "modle",
        "training",
    ]


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("model", "d_modle", "did you mean model.d_model?"),
        ("training", "save_steps", "did you mean checkpoint.save_steps?"),
        ("training", "n_layer", "did you mean model.n_layers?"),
        ("training", "batch_size", "did you mean training.micro_batch_size?"),
        ("telemetry", "zzz", "known here: log_steps, tensorboard, progress_bar"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    problems: Problems, minimal: dict[str, Any], section: str, key: str, message: str
) -> None:
    minimal.setdefault(section, {})[key] = 1
    (line,) = problems(minimal)
    assert line.startswith(f"{section}.{key}: unknown key")
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modle", "unknown key, did you mean model?"),
        ("learning_rate", "unknown key, did you mean training.learning_rate?"),
        (
            "zzz",
            "unknown key; known here: "
            "schema_version, model, training, data, engine, checkpoint, telemetry",
        ),
    ],
)
def test_an_unknown_section_names_the_nearest_known_path(
    problems: Problems, minimal: dict[str, Any], key: str, message: str
) -> None:
    minimal[key] = {}
    assert problems(minimal) == [f"{key}: {message}"]


def test_a_key_that_is_no_text_is_unknown(problems: Problems) -> None:
    text = "schema_version: 2\n3: 4\ntraining: {global_batch_size: 32, num_epochs: 1, 5: 6}\n"
    assert [line.split(";")[0] for line in problems(text)] == [
        "training.5: unknown key",
        "3: unknown key",
    ]


def test_a_current_file_needs_its_training_section(problems: Problems) -> None:
    assert problems({"schema_version": 2, "model": {}}) == [
        "training: missing; every config has this section"
    ]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"max_steps": 2000},
            "give exactly one of global_batch_size, gradient_accumulation_steps "
            "(how large an optimizer step is); found none of them",
        ),
        (
            {"max_steps": 2000, "global_batch_size": 32, "gradient_accumulation_steps": 1},
            "found global_batch_size and gradient_accumulation_steps",
        ),
        (
            {"max_steps": 2000, "max_tokens": 1, "global_batch_size": 32},
            "give exactly one of num_epochs, max_steps, max_tokens "
            "(how long the run is); found max_steps and max_tokens",
        ),
        (
            {"max_steps": 1000, "global_batch_size": 32},
            "warmup_steps 1000 must be below max_steps 1000",
        ),
        (
            {"max_steps": 2000, "global_batch_size": 33},
            "global_batch_size 33 must be a multiple of micro_batch_size 32",
        ),
    ],
)
def test_rules_of_the_training_section(
    problems: Problems, training: dict[str, Any], message: str
) -> None:
    (line,) = problems({"schema_version": 2, "training": training})
    assert line.startswith("training: ")
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"dt_rank": 4097}, "dt_rank 4097 is outside 1..4096 (d_inner)"),
        ({"dt_rank": 0}, "dt_rank 0 is outside 1..4096 (d_inner)"),
        ({"pad_token_id": 50280}, "pad_token_id 50280 must be below vocab_size 50280"),
        ({"dt_min": 0.2}, "dt_min 0.2 must not exceed dt_max 0.1"),
        ({"ngroups": 2}, "ngroups is 2; Mamba-1 has one group, set ngroups: 1"),
        (
            {"layer": "mamba2", "headdim": 96},
            "headdim 96 must divide d_inner 4096 = expand * d_model",
        ),
        (
            {"layer": "mamba2", "ngroups": 3},
            "ngroups 3 must divide the 64 heads (d_inner 4096 / headdim 64)",
        ),
    ],
)
def test_rules_of_the_model_section(
    problems: Problems, minimal: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    minimal["model"] = model
    assert problems(minimal) == [f"model: {message}"]


def test_mamba2_has_its_own_default_state_size(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    path = write_config(minimal)
    assert load_config(path).config.model.d_state == 16
    assert load_config(path, ["model.layer=mamba2"]).config.model.d_state == 128
    model = load_config(path, ["model.layer=mamba2", "model.d_state=64"]).config.model
    assert model.d_state == 64


def test_splits_may_miss_1_by_a_rounding_only(
    problems: Problems, write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    minimal["data"] = {"train_split": 0.9, "val_split": 0.1000009}
    load_config(write_config(minimal))
    minimal["data"] = {"train_split": 0.9, "val_split": 0.1000011}
    (line,) = problems(minimal)
    assert line.startswith("data: train_split 0.9 + val_split 0.1000011 = 1")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_none_is_refused(problems: Problems, value: float) -> None:
    training = "training: {global_batch_size: 32, max_steps: 2000}"
    text = f"schema_version: 2\n{training}\nmodel: {{dt_scale: .{value}}}"
    assert problems(text) == [
        f"model.dt_scale: found {value}, expected a number above 0 and at most 100"
    ]


def test_a_long_value_is_shortened(problems: Problems, minimal: dict[str, Any]) -> None:
    minimal["training"]["precision"] = "x" * 1000
    (line,) = problems(minimal)
    assert line == f"training.precision: found '{'x' * 79}…, expected one of 'bf16', 'fp32'"


def test_a_whole_number_written_as_a_float_is_refused_with_the_integer_to_write(
    problems: Problems, minimal: dict[str, Any]
) -> None:
    minimal["training"]["eval_sequences"] = 1e3
    (line,) = problems(minimal)
    assert line.endswith("found 1000.0, expected an integer of at least 1; write 1000")
    minimal["training"]["eval_sequences"] = 1.5
    (line,) = problems(minimal)
    assert line.endswith("found 1.5, expected an integer of at least 1")


def test_a_config_cannot_be_changed_after_loading(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    config = load_config(write_config(minimal)).config
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 3  # type: ignore[misc]


def test_the_package_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, mamba_dist.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
