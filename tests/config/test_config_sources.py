"""data.sources: a mixture in the config, instead of one data.dataset_path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import ConfigLoader, load_config
from mamba_dist.config.schema import SourceConfig

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]

MIXTURE = [{"path": "web", "weight": 7}, {"path": "code", "weight": 0.3, "max_epochs": 4}]


@pytest.fixture
def mixed(minimal: dict[str, Any]) -> dict[str, Any]:
    return {**minimal, "data": {"sources": MIXTURE}}


def test_sources_are_read_with_their_weights_and_limits(
    write_config: WriteConfig, mixed: dict[str, Any]
) -> None:
    config = load_config(write_config(mixed)).config
    assert config.data.dataset_path is None
    assert config.data.all_sources == (
        SourceConfig(path="web", weight=7.0, max_epochs=None),
        SourceConfig(path="code", weight=0.3, max_epochs=4),
    )


def test_a_single_data_set_is_a_mixture_of_one(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    assert load_config(write_config(minimal)).config.data.all_sources == (
        SourceConfig(path="data/"),
    )
    given = {**minimal, "data": {"dataset_path": "web"}}
    assert load_config(write_config(given)).config.data.all_sources == (SourceConfig(path="web"),)


def test_the_resolved_config_of_a_mixture_is_read_back_as_it_was(
    write_config: WriteConfig, mixed: dict[str, Any], tmp_path: Path
) -> None:
    mixed["checkpoint"] = {"accept_changes": ["global_batch_size", "data_mixture"]}
    config = load_config(write_config(mixed)).config
    ConfigLoader.save_to_file(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").config == config


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"dataset_path": "a", "sources": [{"path": "b"}]},
            "data: give exactly one of dataset_path and sources; found 'a' and 1 sources",
        ),
        (
            {"dataset_path": None},
            "data: give exactly one of dataset_path and sources; found None and 0 sources",
        ),
        (
            {"sources": [{"path": "b"}, {"path": "b", "weight": 2}]},
            "data: sources must have different paths, found b, b",
        ),
        (
            {"sources": [{"path": "a"}, {"path": "b", "weight": 0}]},
            "data.sources.1.weight: found 0, expected a number above 0",
        ),
        (
            {"sources": [{"path": "a", "max_epochs": 0}]},
            "data.sources.0.max_epochs: found 0, expected an integer of at least 1 or null",
        ),
        (
            {"sources": [{"path": "a", "wieght": 1}]},
            "data.sources.0.wieght: unknown key, did you mean data.sources.0.weight?",
        ),
        ({"sources": [{"weight": 1}]}, "data.sources.0.path: missing, expected text"),
        ({"sources": ["a"]}, "data.sources.0: found 'a', expected a mapping of its fields"),
    ],
)
def test_a_wrong_mixture_is_refused_by_its_entry_and_field(
    problems: Problems, minimal: dict[str, Any], data: dict[str, Any], expected: str
) -> None:
    assert problems({**minimal, "data": data}) == [expected]


def test_an_override_of_one_form_replaces_the_other(
    write_config: WriteConfig, mixed: dict[str, Any], minimal: dict[str, Any]
) -> None:
    loaded = load_config(write_config(mixed), ["data.dataset_path=books"])
    assert loaded.config.data.all_sources == (SourceConfig(path="books"),)
    assert "replaces data.sources" in loaded.account[-1]
    single = {**minimal, "data": {"dataset_path": "books"}}
    loaded = load_config(write_config(single), ["data.sources=[{path: web, weight: 2}]"])
    assert loaded.config.data.all_sources == (SourceConfig(path="web", weight=2.0),)
