import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mamba_dist.data.workers import distribute, start_workers, stop_workers
from mamba_dist.errors import DataError

PARENT = """
import time
from mamba_dist.data.workers import start_workers

def work(connection, payload):
    connection.send("at work")
    time.sleep(600)

if __name__ == "__main__":
    [worker] = start_workers(work, [None])
    worker.connection.recv()
    print(worker.process.pid, flush=True)
    time.sleep(600)
"""


def test_a_busy_worker_ends_at_once_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be there to reap it


def test_every_task_is_answered_by_any_number_of_workers() -> None:
    for count in (1, 3):
        workers = start_workers(square, [0] * count)
        try:
            assert sorted(distribute(workers, range(20))) == [n * n for n in range(20)]
        finally:
            stop_workers(workers)


def test_a_worker_that_dies_is_reported_with_its_task() -> None:
    workers = start_workers(square, [7, 7])
    try:
        with pytest.raises(
            DataError, match=r"a worker died \(exit code 3, .*\) on 7; run the same"
        ):
            list(distribute(workers, range(20)))
    finally:
        stop_workers(workers)
    assert not any(worker.process.is_alive() for worker in workers)


def square(connection: object, fatal: int) -> None:
    """A worker that answers with squares and dies of one number, unless that is 0."""
    while True:
        try:
            number = connection.recv()  # type: ignore[attr-defined]
        except (EOFError, ConnectionError):
            return
        if fatal and number == fatal:
            os._exit(3)
        connection.send(number * number)  # type: ignore[attr-defined]
