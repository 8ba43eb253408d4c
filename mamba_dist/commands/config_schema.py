"""tools/config_schema.py: the JSON schema of a config file, for editors and checkers."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamba_dist.config import RunConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import MambaDistError

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`: 0 printed or written, 2 cannot be written."""
    arguments = _parser().parse_args(argv)
    text = json.dumps(config_schema(), indent=2) + "\n"
    if arguments.output is None:
        sys.stdout.write(text)
        return 0
    try:
        write_text(text, arguments.output)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"wrote {arguments.output}")
    return 0


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the current version, with the documentation of every field."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/config_schema.py",
        description="Print the JSON schema of a config file.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead")
    return parser
