"""Which rank a process is and where the ranks meet, as each launcher tells it."""

import pytest

from mamba_dist.engine.placement import (
    Placement,
    first_host,
    meeting_point,
    placement_from_environment,
)
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


@pytest.mark.parametrize(
    ("node", "tasks", "size"),
    [("0", "2(x2),1", 2), ("1", "2(x2),1", 2), ("2", "2(x2),1", 1), ("1", "1,3", 3)],
)
def test_nodes_of_a_step_may_have_different_numbers_of_ranks(
    node: str, tasks: str, size: int
) -> None:
    # SLURM_NTASKS_PER_NODE is the job's, of which a step may use less.
    step = {**SRUN, "SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "0"}
    assert placement_from_environment(step).local_size == size


@pytest.mark.parametrize("tasks", ["", "2(x2", "two", "2,"])
def test_what_srun_says_of_its_nodes_is_shown_if_it_is_not_understood(tasks: str) -> None:
    step = {**SRUN, "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks}
    with pytest.raises(EngineError, match=r"SLURM_STEP_TASKS_PER_NODE=.* is not understood"):
        placement_from_environment(step)


def test_python_in_the_interactive_shell_of_an_allocation_is_a_world_of_one() -> None:
    # salloc's shell may be a step of one task, in a job of 16.
    shell = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert placement_from_environment(shell).world_size == 1


SIXTEEN = Placement(rank=9, world_size=16, local_rank=1, local_size=8)
STEP = {**SRUN, "SLURM_STEP_NODELIST": "gpu[07-08]"}


def met(environment: dict[str, str], placement: Placement = SIXTEEN) -> tuple[str, str]:
    address, port = meeting_point(environment, placement, free_port=40000)
    assert (address.name, port.name) == ("MASTER_ADDR", "MASTER_PORT")
    return address.value, port.value


def test_the_ranks_of_a_step_meet_on_its_first_node() -> None:
    address, port = met(STEP)
    assert address == "gpu07"
    assert 15000 <= int(port) < 30000


def test_steps_that_may_share_a_node_meet_at_different_ports() -> None:
    steps = [
        {**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(1000, 1400)
        for step in range(4)
    ]
    assert len({met(step)[1] for step in steps}) == len(steps)


def test_a_meeting_point_that_is_set_is_taken() -> None:
    assert met({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}) == ("10.0.0.1", "7")
    assert met({**STEP, "MASTER_ADDR": "10.0.0.1"})[0] == "10.0.0.1"
    origins = [
        str(each) for each in meeting_point({**STEP, "MASTER_PORT": "7"}, SIXTEEN, free_port=1)
    ]
    assert origins == ["MASTER_ADDR=gpu07 (ours: from the SLURM step)", "MASTER_PORT=7 (was set)"]


def test_one_rank_meets_itself_at_a_free_port() -> None:
    assert met(STEP, Placement(0, 1, 0)) == ("127.0.0.1", "40000")


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        (TORCHRUN, "MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "7"}, "MASTER_ADDR"),
        # A launcher in a step has ranks of its own, which need not meet where the step begins.
        ({**STEP, **TORCHRUN, "MASTER_ADDR": "n1"}, "MASTER_PORT"),
        (SRUN, "MASTER_ADDR"),
    ],
)
def test_ranks_that_do_not_know_where_to_meet_are_told_what_is_missing(
    environment: dict[str, str], missing: str
) -> None:
    with pytest.raises(EngineError, match=f"^{missing} not set, and 16 ranks must meet"):
        met(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003,007-010],cpu1", "gpu003"),
        ("rack[2-3]n[05-07]-ib", "rack2n05-ib"),
        ("a1,b[2-3]", "a1"),
        ("node-a.site,node-b.site", "node-a.site"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
