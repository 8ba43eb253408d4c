import subprocess
import sys
import time
from pathlib import Path

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
