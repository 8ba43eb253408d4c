"""Evaluates a run beside n-gram baselines, see --help."""

from mamba_dist.commands.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
