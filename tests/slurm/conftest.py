"""One cluster for all tests of this folder, or a skip that says what is missing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import LocalSlurm, local_slurm, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A real SLURM on this machine."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # Not pytest's own folder, whose path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, local_slurm(Path(folder)) as it:
        yield it
