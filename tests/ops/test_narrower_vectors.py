"""The native kernels with the vectors of smaller processors give the results of the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import clean_environment

WORKER = Path(__file__).with_name("narrower_vectors_worker.py")


@pytest.mark.parametrize("instruction_set", ["avx2", "default"])
def test_narrower_vectors_give_the_same_results(instruction_set: str) -> None:
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env={**clean_environment(), "ATEN_CPU_CAPABILITY": instruction_set, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip().lower()) == (0, instruction_set), done.stderr
