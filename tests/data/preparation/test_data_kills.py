"""kill -9 at every change of the disk, then the same build again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import BuildServer, build_server
from made_data import folder_bytes

from mamba_dist.data.dataset import open_dataset
from mamba_dist.errors import DataError

UNITS = 5
# Of a build's changes, how far apart are those that the quick form tries; coprime to the changes
# that a unit makes, so that it meets all of them.
STRIDE = 7


@pytest.fixture(scope="module")
def server(corpus_path: Path, tokenizer_path: Path) -> Iterator[BuildServer]:
    with build_server(corpus_path, tokenizer_path) as running:
        yield running


def journalled(output: Path) -> int:
    lines = [path.read_bytes().count(b"\n") for path in output.glob(".partial-*/journal*.jsonl")]
    return sum(lines)


def made_parts(output: Path) -> int:
    return len(list(output.glob(".partial-*/parts/unit-*.part")))


def check_killed(output: Path, finished: Path, *, workers: int) -> int:
    """Looks at what a kill left; returns how many units are journalled."""
    if (output / "manifest.json").exists():
        assert open_dataset(output).fingerprint == open_dataset(finished).fingerprint
        return UNITS
    with pytest.raises(DataError, match="holds no manifest"):
        open_dataset(output)
    if not any(output.glob("*.arrow")) and any(output.glob(".partial-*/parts")):
        assert 0 <= made_parts(output) - journalled(output) <= workers
    return journalled(output)


def walk(server: BuildServer, finished: Path, tmp_path: Path, *, workers: int, stride: int) -> None:
    whole = server.build(tmp_path / "whole", workers=workers)
    assert folder_bytes(tmp_path / "whole") == folder_bytes(finished)
    assert whole.changes is not None
    for change in range(1, whole.changes + 1, stride):
        output = tmp_path / f"at-{change}"
        assert server.build(output, kill_at=change, workers=workers).killed
        if not output.exists():
            continue
        done = check_killed(output, finished, workers=workers)
        again = server.build(output, workers=workers)
        assert again.units == UNITS - done, change
        assert again.leftovers == 0, change
        assert folder_bytes(output) == folder_bytes(finished), change


def test_a_build_killed_at_any_change_goes_on_and_leaves_the_same_folder(
    server: BuildServer, finished: Path, tmp_path: Path
) -> None:
    walk(server, finished, tmp_path, workers=1, stride=STRIDE)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_build_killed_at_each_change_goes_on_and_leaves_the_same_folder(
    server: BuildServer, finished: Path, tmp_path: Path, workers: int
) -> None:
    walk(server, finished, tmp_path, workers=workers, stride=1 if workers == 1 else 3)


@pytest.mark.slow
def test_a_task_killed_at_each_change_goes_on_and_the_merge_gives_the_same_folder(
    server: BuildServer, finished: Path, tmp_path: Path
) -> None:
    whole = server.build(tmp_path / "whole", share="0/2")
    assert whole.changes is not None
    for change in range(1, whole.changes + 1):
        output = tmp_path / f"at-{change}"
        assert server.build(output, share="0/2", kill_at=change).killed
        server.build(output, share="1/2")
        assert server.build(output, share="0/2").leftovers == 0, change
        assert server.build(output, merge_only=True).units == 0
        assert folder_bytes(output) == folder_bytes(finished), change


@pytest.mark.slow
def test_a_build_killed_again_and_again_gets_done(
    server: BuildServer, finished: Path, tmp_path: Path
) -> None:
    kills = 0
    while server.build(tmp_path / "set", kill_at=15 + 3 * kills, workers=1 + kills % 2).killed:
        kills += 1
        assert kills < 30
    assert kills > 5
    assert folder_bytes(tmp_path / "set") == folder_bytes(finished)
