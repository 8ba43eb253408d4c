"""Submits a training job to SLURM: config and code frozen, checked before it waits, see --help."""

import os

from mamba_dist.commands.submit import main

if __name__ == "__main__":
    raise SystemExit(main(environment=os.environ))
