"""Which rank a process is, as each launcher tells it."""

import subprocess
import sys

import pytest
from processes import clean_environment

from mamba_dist.engine.placement import Placement, placement_from_environment
from mamba_dist.engine.world import launcher_pids
from mamba_dist.errors import EngineError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "8",
}


@pytest.mark.parametrize(
    ("environment", "placement"),
    [
        (TORCHRUN, Placement(rank=5, world_size=8, local_rank=1, local_size=4)),
        (DEEPSPEED, Placement(rank=3, world_size=4, local_rank=1, local_size=2)),
        (SRUN, Placement(rank=9, world_size=16, local_rank=1, local_size=8)),
    ],
    ids=["torchrun", "deepspeed", "srun"],
)
def test_each_launcher_is_understood(environment: dict[str, str], placement: Placement) -> None:
    assert placement_from_environment(environment) == placement


def test_a_plain_start_is_a_world_of_one() -> None:
    assert placement_from_environment({"PATH": "/bin"}) == Placement(0, 1, 0)


def test_plain_python_inside_an_allocation_is_a_world_of_one() -> None:
    # A batch script and salloc's shell have SLURM's variables, but no step.
    allocation = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert placement_from_environment(allocation) == Placement(0, 1, 0)


def test_a_launcher_started_by_srun_has_the_last_word() -> None:
    found = placement_from_environment({**SRUN, **TORCHRUN})
    assert (found.rank, found.world_size) == (5, 8)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_missing_variable_is_named(missing: str) -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(EngineError, match=f"incomplete.*'{missing}': None"):
        placement_from_environment(environment)


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID"])
def test_a_missing_variable_of_srun_is_named(missing: str) -> None:
    environment = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(EngineError, match=f"incomplete.*'{missing}': None"):
        placement_from_environment(environment)


@pytest.mark.parametrize("value", ["", "two", "-1", "1.0"])
def test_what_is_no_rank_number_is_shown(value: str) -> None:
    with pytest.raises(EngineError, match=f"'RANK': '{value}'"):
        placement_from_environment({**TORCHRUN, "RANK": value})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**TORCHRUN, "RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({**SRUN, "SLURM_PROCID": "16"}, "SLURM_PROCID=16 must be below SLURM_NTASKS=16"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "must be below WORLD_SIZE=0"),
    ],
)
def test_contradictions_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        placement_from_environment(environment)


def test_a_process_that_no_deepspeed_launcher_started_has_none_to_outlive() -> None:
    assert launcher_pids() == ()


def test_a_rank_on_the_cpu_keeps_freed_memory() -> None:
    program = (
        "from mamba_dist.engine import world\n"
        "kept = []\n"
        "world.keep_freed_memory = lambda environment: kept.append(1)\n"
        "world.start_world(timeout_minutes=1)\n"
        "world.stop_world()\n"
        "print(len(kept), flush=True)\n"
    )
    environment = {**clean_environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["1"], done.stderr
