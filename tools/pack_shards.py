"""Packs a data set for a journey, and unpacks it, see --help."""

from mamba_dist.commands.pack_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
