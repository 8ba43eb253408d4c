"""Says what a run takes of memory and time, by stage, before there is any data, see --help."""

from mamba_dist.commands.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
