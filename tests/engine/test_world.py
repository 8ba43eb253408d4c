"""Real worlds of one rank, and the processes that start ranks."""

import subprocess
import sys

from processes import clean_environment

from mamba_dist.engine.world import launcher_pids


def test_a_process_that_no_deepspeed_launcher_started_has_none_to_outlive() -> None:
    assert launcher_pids() == ()


def test_a_rank_keeps_freed_memory_and_all_its_groups_have_the_timeout_of_the_config() -> None:
    program = (
        "import torch\n"
        "from deepspeed.utils import groups\n"
        "from mamba_dist.engine import world\n"
        "kept = []\n"
        "world.keep_freed_memory = lambda environment: kept.append(1)\n"
        "account = world.start_world(timeout_minutes=7).account\n"
        # In the one ZeRO's collectives run, in the other FSDP2's.
        "made = (groups._clone_world_group(), torch.distributed.new_group([0]))\n"
        "for group in (torch.distributed.group.WORLD, *made):\n"
        "    options = group._get_backend(torch.device('cpu')).options\n"
        "    kept.append(options._timeout.total_seconds())\n"
        "world.stop_world()\n"
        # As a rank on a GPU does it, which differs in the cache.
        "alone = world.Placement(0, 1, 0)\n"
        "account += tuple(map(str, world._prepare_node(alone, torch.device('cuda'))))\n"
        "print(*account, kept, sep='\\n', flush=True)\n"
    )
    chosen = {"CUDA_VISIBLE_DEVICES": "", "NCCL_DEBUG": "WARN", "TRITON_CACHE_DIR": "/mine"}
    environment = {**clean_environment(), **chosen}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    [begin] = [n for n, line in enumerate(lines) if line.startswith("1 ranks on 1 hosts: ")]
    settings, *on_gpu, kept = lines[begin + 1 :]
    assert kept == "[1, 420.0, 420.0, 420.0]", done.stderr
    assert "TRITON_CACHE_DIR=/mine (was set)" in on_gpu
    for said in (
        "MASTER_ADDR=127.0.0.1 (ours: one rank)",
        "OMP_NUM_THREADS=1 (was set)",
        "NCCL_DEBUG=WARN (was set)",
        "timeout_minutes=7 (engine.timeout_minutes)",
    ):
        assert said in settings
