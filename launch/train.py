"""Trains a model: `deepspeed launch/train.py --config configs/quickstart.yaml`, see the README."""

import os
import sys

from mamba_dist.commands.train import main

if __name__ == "__main__":
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    code = main(first_rank=rank == "0")
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed by now. Taking the interpreter apart is left out: torch's
    # communication threads live on in objects that DeepSpeed keeps, and about one finished run in
    # fifty was aborted there ("terminate called without an active exception").
    os._exit(code)
