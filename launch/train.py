"""Trains a model: `deepspeed launch/train.py --config configs/quickstart.yaml`, see the README."""

import os

from mamba_dist.commands.train import main

if __name__ == "__main__":
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    raise SystemExit(main(first_rank=rank == "0"))
