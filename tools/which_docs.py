"""Says which documents stand at a place of a data set, see --help."""

from mamba_dist.commands.which_docs import main

if __name__ == "__main__":
    raise SystemExit(main())
