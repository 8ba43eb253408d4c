"""Two ranks that see run folders of their own and different data sets begin a run, then find
different checkpoints in these folders; prints what stops them."""

import os
import sys
from pathlib import Path

from mamba_dist.config.batch import batch_plan
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.world import start_world, stop_world
from mamba_dist.errors import CheckpointError, StartError
from mamba_dist.train import preflight, run_folder
from mamba_dist.train.build import Prepared
from mamba_dist.train.state import starting_point

world = start_world(timeout_minutes=1)
config = RunConfig.model_validate(
    {
        "model": {"d_model": 16, "n_layers": 1, "vocab_size": 320},
        "training": {
            "run_dir": f"{sys.argv[1]}-{world.rank}",
            "micro_batch_size": 1,
            "global_batch_size": 2,
            "max_steps": 1,
            "warmup_steps": 0,
        },
    }
)
content = SourceContent(1_000, 10, 99, 3, 2, "a" * 64, 320, 0, 0.9, 0.1)
own = SourceRecord("data/copy", f"{world.rank}" * 64, 1.0, None, 100, content)
order = RunOrder([first_segment([own], global_batch_size=2)], seed=0, shuffle=True)
preflight.prepare = lambda config, ranks: Prepared(batch_plan(config, ranks), (), order)
run_folder._APPEARS_WITHIN_S = 0.0
folder = run_folder.HeldFolder(Path(f"{sys.argv[1]}-{world.rank}"), world)
folder.take()
try:
    preflight.prepare_and_check(config, folder, world=world)
except StartError as error:
    print(str(error).replace("\n", ""))
try:
    starting_point(config, world=world, fresh=order)
except CheckpointError as error:
    print(error, error.of_one_rank)
stop_world()
sys.stdout.flush()
os._exit(0)  # as launch/train.py does, and for the same reason
