"""From a file to a checked RunConfig: read, migrate, override, validate; and back to a file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mamba_dist.config.compatibility import compatibility_problems, validate_config_compatibility
from mamba_dist.config.migrate import Migration, migrate, version_of
from mamba_dist.config.overrides import apply_overrides
from mamba_dist.config.report import Problem, config_error, schema_problems
from mamba_dist.config.schema import RunConfig
from mamba_dist.config.text import Document, read_document, write_document

__all__ = [
    "ConfigLoader",
    "LoadedConfig",
    "create_default_config",
    "load_config",
    "validate_config_compatibility",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, and what was changed to get there."""

    config: RunConfig
    account: tuple[str, ...]
    """Lines to print: what each field of an older version became, what overrides cleared."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The config in the YAML or JSON file `path`, of any version, with the overrides in place.

    An override reads `section.field=value`. A file that names no training.run_dir runs in
    runs/<name of the file>.

    Raises:
        ConfigError: the file or an override is wrong; lists every problem with its dotted path.
    """
    path = Path(path)
    return _load(path, overrides, default_run_dir=f"runs/{path.stem}")


def create_default_config() -> RunConfig:
    """The config that an empty file of schema version 1 stood for."""
    return RunConfig.model_validate(migrate({}, version=1).document)


class ConfigLoader:
    """Files to configs and back, exactly: nothing is added that the file does not say."""

    @staticmethod
    def load_from_file(path: str | Path) -> RunConfig:
        """The config in the YAML or JSON file `path`; the account of a migration is logged.

        Raises:
            ConfigError: as `load_config`.
        """
        loaded = ConfigLoader.load_with_account(path)
        if loaded.account:
            _log.warning("%s", "\n".join(loaded.account))
        return loaded.config

    @staticmethod
    def load_with_account(path: str | Path) -> LoadedConfig:
        """The config in the YAML or JSON file `path`, with the account of its migration.

        Raises:
            ConfigError: as `load_config`.
        """
        return _load(Path(path), (), default_run_dir=None)

    @staticmethod
    def save_to_file(config: RunConfig, path: str | Path) -> None:
        """Writes every field of `config` to `path` as YAML or JSON, in one step.

        Raises:
            ConfigError: the suffix is unknown or the file cannot be written.
        """
        write_document(config.model_dump(), Path(path))


def _load(path: Path, overrides: Sequence[str], *, default_run_dir: str | None) -> LoadedConfig:
    source = str(path)
    document = read_document(path)
    version = version_of(document)
    if isinstance(version, Problem):
        raise config_error([version], source=source)
    migration = migrate(document, version=version)
    overridden = apply_overrides(migration.document, overrides)
    _fill_run_dir(overridden.document, default_run_dir)
    problems = [*migration.problems, *overridden.problems]
    try:
        config = RunConfig.model_validate(overridden.document)
        problems += _as_written(compatibility_problems(config), migration, overridden.paths)
    except ValidationError as error:
        problems += _as_written(schema_problems(error), migration, overridden.paths)
    if problems:
        raise config_error(problems, source=source)
    account = [f"{source}: {line}" for line in migration.account[:1]]
    return LoadedConfig(config, (*account, *migration.account[1:], *overridden.account))


def _fill_run_dir(document: Document, run_dir: str | None) -> None:
    training = document.get("training")
    if isinstance(training, dict) and training.get("run_dir") is None:
        training["run_dir"] = run_dir


def _as_written(
    problems: Sequence[Problem], migration: Migration, overridden: frozenset[str]
) -> list[Problem]:
    """The problems under the names that the user wrote."""
    return [
        Problem(_written_path(p.path, migration.written_as, overridden), p.message)
        for p in problems
    ]


def _written_path(path: str, written_as: Mapping[str, str], overridden: frozenset[str]) -> str:
    if path in overridden:
        return f"override {path}"
    return written_as.get(path, path)
