"""tools/migrate_config.py: rewrites a config of any older version as one of the current version."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mamba_dist.config import SCHEMA_VERSION, ConfigLoader
from mamba_dist.errors import ConfigError, MambaDistError

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`: 0 written, 2 a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        account = rewrite(arguments.old, arguments.output, force=arguments.force)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    for line in account:
        print(line)
    print(f"wrote {arguments.output}")
    return 0


def rewrite(old: Path, new: Path, *, force: bool) -> tuple[str, ...]:
    """Writes the config of file `old` to `new`, every field included, and returns what changed.

    Raises:
        ConfigError: `old` is wrong, or `new` exists without `force`; nothing is written.
    """
    loaded = ConfigLoader.load_with_account(old)
    if new.exists() and not force:
        raise ConfigError(f"{new} exists; give another --output, or --force to replace it")
    ConfigLoader.save_to_file(loaded.config, new)
    return loaded.account or (f"{old}: is of schema version {SCHEMA_VERSION} already",)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/migrate_config.py",
        description=f"Rewrite an older config file in schema version {SCHEMA_VERSION}.",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="YAML or JSON file of any version")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="NEW", help=".yaml, .yml or .json file"
    )
    parser.add_argument("--force", action="store_true", help="replace NEW if it exists")
    return parser
