"""Counts, lengths, frequent tokens and samples of a data set, see --help."""

from mamba_dist.commands.inspect_data import main

if __name__ == "__main__":
    raise SystemExit(main())
