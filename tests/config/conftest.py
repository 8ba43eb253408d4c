"""Config files in a temporary folder, and the lines of the error that a bad one gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import load_config
from mamba_dist.errors import ConfigError

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]


@pytest.fixture
def write_config(tmp_path: Path) -> WriteConfig:
    """Writes a mapping, or text as it is, and returns the path; JSON is YAML too."""

    def write(content: dict[str, Any] | str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return path

    return write


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The shortest valid file."""
    return {"schema_version": 2, "training": {"global_batch_size": 32, "max_steps": 2000}}


@pytest.fixture
def problems(write_config: WriteConfig) -> Problems:
    """The problems of a bad config, each without the name of the file."""

    def find(content: dict[str, Any] | str, *overrides: str, name: str = "run.yaml") -> list[str]:
        path = write_config(content, name)
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        head, *lines = str(caught.value).split("\n")
        if not lines:
            assert head.startswith(f"{path}: "), head
            return [head.removeprefix(f"{path}: ")]
        assert head == f"{path} has {len(lines)} problems:"
        assert all(line.startswith(f"  {path}: ") for line in lines), lines
        return [line.removeprefix(f"  {path}: ") for line in lines]

    return find
