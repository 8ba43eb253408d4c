"""Checks the files of a data set against its manifest, see --help."""

from mamba_dist.commands.verify_shards import main

if __name__ == "__main__":
    raise SystemExit(main())
