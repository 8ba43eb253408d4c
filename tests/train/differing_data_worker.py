"""Two ranks that find different data sets at the same place begin a run, then two that see
different checkpoints in run folders of their own; prints what stops them."""

import os
import sys
from dataclasses import replace

from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.world import start_world, stop_world
from mamba_dist.errors import CheckpointError, DataError
from mamba_dist.train.state import starting_point

world = start_world(timeout_minutes=1)
config = RunConfig.model_validate(
    {
        "training": {
            "run_dir": f"{sys.argv[1]}-{world.rank}",
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "max_steps": 1,
            "warmup_steps": 0,
        }
    }
)
content = SourceContent(1_000, 10, 99, 3, 2, "a" * 64, 320, 0, 0.9, 0.1)
own = SourceRecord("data/copy", f"{world.rank}" * 64, 1.0, None, 100, content)
order = RunOrder([first_segment([own], global_batch_size=2)], seed=0, shuffle=True)
try:
    starting_point(config, world=world, fresh=order)
except DataError as error:
    print(error, error.of_one_rank)
same = RunOrder(
    [first_segment([replace(own, fingerprint="f" * 64)], global_batch_size=2)],
    seed=0,
    shuffle=True,
)
try:
    starting_point(config, world=world, fresh=same)
except CheckpointError as error:
    print(error, error.of_one_rank)
stop_world()
sys.stdout.flush()
os._exit(0)  # as launch/train.py does, and for the same reason
