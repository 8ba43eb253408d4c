"""Prints the JSON schema of a config file: `tools/config_schema.py --output schema.json`."""

from mamba_dist.commands.config_schema import main

if __name__ == "__main__":
    raise SystemExit(main())
