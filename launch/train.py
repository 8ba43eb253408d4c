"""Trains a model: `deepspeed launch/train.py --config configs/quickstart.yaml`, see the README."""

import os
import sys
import traceback

from mamba_dist.commands.train import main

if __name__ == "__main__":
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    try:
        code = main(first_rank=rank == "0")
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed by now. Taking the interpreter apart is left out: a finished
    # rank was once seen to abort there ("terminate called without an active exception"), presumably
    # in a communication thread of torch that outlives its group. It was not reproduced.
    os._exit(code)
