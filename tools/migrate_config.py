"""Rewrites an older config for the current schema: `migrate_config.py OLD --output NEW`."""

from mamba_dist.commands.migrate_config import main

if __name__ == "__main__":
    raise SystemExit(main())
