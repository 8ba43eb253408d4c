"""What a rank knows of what started it, by real processes with the launchers' names."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, clean_environment

from mamba_dist.engine.launcher import GONE, launch_of, processes_to_outlive

TORCHRUN = {"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = {"RANK": "0", "CROSS_RANK": "0"}

# Starts the next of a list of programs and waits for it; its own command line names itself alone.
STAND_IN = """
import json, os, subprocess, sys
first, *others = json.loads(os.environ["NEXT"])
sys.exit(subprocess.Popen(first, env={**os.environ, "NEXT": json.dumps(others)}).wait())
"""
# Says whom it would watch, once it is told to look.
RANK = """
import os, sys, time
from pathlib import Path
from mamba_dist.engine.launcher import processes_to_outlive
folder = Path(sys.argv[1])
(folder / "ready").touch()
while not (folder / "look").exists():
    time.sleep(0.01)
found = processes_to_outlive(os.environ)
(folder / "said.new").write_text(repr((os.getppid(), found)))
(folder / "said.new").rename(folder / "said")
"""


def watched(
    folder: Path, names: list[str], environment: dict[str, str], *, killed: int | None = None
) -> tuple[list[int], tuple[int, ...]]:
    """Process ids of the stand-ins, outermost first, and those that a rank under them watches.

    The stand-in with the number `killed` is killed before the rank looks.
    """
    stand_ins = [[sys.executable, "-c", STAND_IN, *name.split()] for name in names]
    others = [*stand_ins[1:], [sys.executable, "-c", RANK, str(folder)]]
    begun = subprocess.Popen(
        stand_ins[0],
        env={
            **clean_environment(),
            **environment,
            "PYTHONPATH": str(ROOT),
            "NEXT": json.dumps(others),
        },
        # Whoever takes over the stand-ins of a killed one may be in the session of the tests.
        start_new_session=True,
    )
    try:
        wait_for(folder / "ready")
        pids = [begun.pid]
        for _ in names[1:]:
            pids.append(child_of(pids[-1]))
        if killed is not None:
            os.kill(pids[killed], signal.SIGKILL)
            wait_until_gone(pids[killed], begun)
        (folder / "look").touch()
        wait_for(folder / "said")
    finally:
        begun.kill()
        begun.wait()
    parent, found = eval((folder / "said").read_text())
    assert killed == len(names) - 1 or parent == pids[-1]
    return pids, found


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


def wait_until_gone(pid: int, begun: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 30
    while begun.poll() is None and Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


LAUNCH = "deepspeed.launcher.launch"


@pytest.mark.parametrize(
    ("names", "environment", "killed", "expected"),
    [
        (["/bin/torchrun"], TORCHRUN, None, [0]),
        (["/bin/torchrun", "wrapper"], TORCHRUN, None, [0]),
        (["/bin/deepspeed", LAUNCH], DEEPSPEED, None, [1, 0]),
        # By hand, by ssh or by a shell script: nobody else to outlive.
        ([LAUNCH], DEEPSPEED, None, [0]),
        (["bash", LAUNCH], DEEPSPEED, None, [1]),
        # Another program of torchrun's library.
        (["accelerate"], TORCHRUN, None, [0]),
        (["bash"], {}, None, []),
        # What another program left in the environment of a plain start.
        (["bash"], {"CROSS_RANK": "0"}, None, []),
        (["/home/deepspeed-runs/go.sh", LAUNCH], DEEPSPEED, None, [1]),
        # On one of several nodes, by ssh and from a script that ends.
        (["go.sh", f"{LAUNCH} --node_rank=0"], DEEPSPEED, 0, [1]),
        (["/bin/deepspeed", LAUNCH], DEEPSPEED, 0, [1, None]),
        (["bash", "/bin/deepspeed", LAUNCH], DEEPSPEED, 1, [2, None]),
    ],
    ids=str,
)
def test_a_rank_outlives_no_launcher(
    tmp_path: Path,
    names: list[str],
    environment: dict[str, str],
    killed: int | None,
    expected: list[int | None],
) -> None:
    pids, found = watched(tmp_path, names, environment, killed=killed)
    assert list(found) == [GONE if n is None else pids[n] for n in expected]


def test_a_rank_whose_starter_is_gone_has_outlived_it() -> None:
    assert processes_to_outlive(DEEPSPEED) == (GONE,)


def test_the_launcher_is_told_by_what_it_leaves_in_the_environment() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
    assert [launch_of(e).launcher for e in (TORCHRUN, DEEPSPEED, step, {})] == [
        "torchrun",
        "deepspeed",
        "srun",
        "python",
    ]
    assert launch_of({**step, **TORCHRUN}).launcher == "torchrun"
    assert launch_of(step).job == "7"
