"""Starts the ranks of launch/train.py by itself, as srun does: a launcher without torch's import.

`python ranks.py RANKS PORT ARGUMENTS…`; ends with the largest exit code, of a signal 128 and more.
"""

import os
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def main() -> int:
    world_size = int(sys.argv[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TRAIN), *sys.argv[3:]],
            env={**os.environ, **meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    codes = [rank.wait() for rank in ranks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
