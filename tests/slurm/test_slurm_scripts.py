"""The job scripts under a real scheduler."""

import pytest
from local_slurm import LocalSlurm

# What one machine's nodes have of what the directives ask for.
SMALL = ("--cpus-per-task=1", "--mem-per-cpu=100")


@pytest.mark.parametrize(
    ("script", "smaller"),
    [
        ("train", ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=30")),
        ("tokenize", (*SMALL, "--time=30")),
        ("tokenize", (*SMALL, "--time=30", "--array=0-3")),
    ],
)
def test_a_scheduler_takes_the_directives(
    slurm: LocalSlurm, script: str, smaller: tuple[str, ...]
) -> None:
    # Another file of directives, or another option of one, would be refused here.
    slurm.call("sbatch", "--test-only", *smaller, f"launch/slurm/{script}.sbatch", "words")
