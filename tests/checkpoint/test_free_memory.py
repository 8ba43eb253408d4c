"""The memory that the host would still give."""

from pathlib import Path

import pytest

from mamba_dist.checkpoint import free_memory
from mamba_dist.checkpoint.free_memory import available_bytes, capacity_bytes


def test_memory_is_what_the_tightest_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = available_bytes()
    assert 1 << 20 < free < 1 << 50
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path)
    own = free_memory._own_group()
    own.mkdir(parents=True, exist_ok=True)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    pages = "inactive_file 60000\nactive_file 30000\nslab_reclaimable 10000\n"
    (tmp_path / "memory.stat").write_text("anon 1\n" + pages)
    assert available_bytes() == 600_000
    assert capacity_bytes() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 1 << 20
    assert capacity_bytes() >= available_bytes()
