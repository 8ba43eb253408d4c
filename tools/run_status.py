"""Tells how far a run is and how its starts ended, see --help."""

from mamba_dist.commands.run_status import main

if __name__ == "__main__":
    raise SystemExit(main())
