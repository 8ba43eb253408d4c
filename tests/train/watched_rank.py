"""A rank under a watchdog, without any training: `watched_rank.py FOLDER RANK TIMEOUT_S FAULT`.

Says "here", takes the other rank's process id, says "begun", and works for some timeouts unless it
has a fault: `idle` does nothing more, `locked` waits for ever in native
code without giving back the lock of the interpreter. `patient` has none, but first takes its time
where it may.
"""

import ctypes
import logging
import sys
import time
from pathlib import Path

from mamba_dist.train.watchdog import Peer, Watchdog, started

folder, rank, timeout_s, fault = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
print("here", flush=True)
pid = int(sys.stdin.readline())
logging.basicConfig(format="%(message)s")
peers = [Peer(1 - rank, pid, started(pid))]
watchdog = Watchdog(Path(folder) / "hangs/now", rank=rank, timeout_s=timeout_s, peers=peers)
with watchdog:
    if fault == "patient":
        # Everything before the first step, a pause, and the first of a kind may take longer.
        time.sleep(1.3 * timeout_s)
        watchdog.step_done(1)
        with watchdog.paused():
            time.sleep(1.3 * timeout_s)
        with watchdog.first_time_paused("compiling"):
            time.sleep(1.3 * timeout_s)
    watchdog.step_done(1)
    print("begun", flush=True)
    if fault == "idle":
        time.sleep(60)
    if fault == "locked":
        libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    for _ in range(25):
        time.sleep(timeout_s / 10)
        watchdog.beat()
time.sleep(1.3 * timeout_s)
