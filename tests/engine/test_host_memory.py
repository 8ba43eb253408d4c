import os
import platform
import subprocess
import sys

import pytest

ROUNDS = 20
# Above the largest block (32 MiB) that glibc keeps by itself.
MIB = 48
# What each round touches anew if its memory was given back: at most 2 MiB a page.
GIVEN_BACK = ROUNDS * MIB // 2 // 2
PROGRAM = f"""
import os, resource, sys, torch
from mamba_dist.engine.host_memory import give_back_freed_memory, keep_freed_memory

if sys.argv[1] in ("keep", "spare"):
    keep_freed_memory(os.environ)
if sys.argv[1] == "spare":
    give_back_freed_memory(os.environ)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range({ROUNDS}):
    torch.ones({MIB}, 1 << 18)
before = faults()
for _ in range({ROUNDS}):
    torch.ones({MIB}, 1 << 18)
print(faults() - before)
"""


def page_faults(choice: str, **variables: str) -> int:
    """Pages that rounds of allocating and freeing a tensor have touched for the first time."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, choice],
        capture_output=True,
        text=True,
        check=True,
        env={n: v for n, v in os.environ.items() if "MALLOC" not in n} | variables,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator")
def test_freed_memory_is_used_again_without_faulting_it_in() -> None:
    assert page_faults("leave") > GIVEN_BACK
    assert page_faults("keep") < GIVEN_BACK / 10
    assert page_faults("spare") > GIVEN_BACK


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator")
def test_what_the_user_has_set_stays() -> None:
    assert page_faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > GIVEN_BACK
