"""Trains while everything goes wrong, and compares with a run left alone, see --help."""

from mamba_dist.commands.soak import main

if __name__ == "__main__":
    raise SystemExit(main())
