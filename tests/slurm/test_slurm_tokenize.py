"""launch/slurm/tokenize.sbatch as an array job of two nodes, and the merge that waits for it."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from local_slurm import LocalSlurm
from word_corpus import folder_contents, write_corpus, write_tokenizer

from mamba_dist.commands.tokenize import main

SCRIPT = "launch/slurm/tokenize.sbatch"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shared disk")
    corpus = write_corpus(folder / "corpus", files=4)
    return corpus, write_tokenizer(folder / "tokenizer.json")


def command(paths: tuple[Path, Path], output: Path) -> tuple[str, ...]:
    corpus, tokenizer = paths
    options = ("--tokenizer", tokenizer, "--output", output, "--backend", "reference")
    return tuple(map(str, (corpus, *options)))


def submit(slurm: LocalSlurm, logs: Path, *words: str, **variables: str) -> str:
    exported = {"MAMBA_DIST_PYTHON": sys.executable, **variables}
    named = ",".join(f"{name}={value}" for name, value in exported.items())
    small = ("--cpus-per-task=1", "--mem-per-cpu=500", f"--export=ALL,{named}")
    return slurm.submit(f"--output={logs}/%j.log", *small, *words)


def logged(logs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(logs.glob("*.log")))


def test_an_array_and_its_merge_give_what_one_machine_gives(
    slurm: LocalSlurm, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main([*command(paths, tmp_path / "here"), "--workers", "1"]) == 0
    words = command(paths, tmp_path / "there")
    array = submit(slurm, tmp_path, "--array=0-2", SCRIPT, *words)
    merge = submit(slurm, tmp_path, f"--dependency=afterok:{array}", SCRIPT, *words, "--merge")
    states = slurm.wait(array, merge)
    assert states == {array: {"COMPLETED"}, merge: {"COMPLETED"}}, logged(tmp_path)
    assert folder_contents(tmp_path / "there") == folder_contents(tmp_path / "here")
    assert "task 2/3: its " in logged(tmp_path)


@pytest.mark.slow
def test_a_task_that_was_left_out_is_named_by_the_merge_and_can_be_run_alone(
    slurm: LocalSlurm, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    words = command(paths, tmp_path / "set")
    array = submit(slurm, tmp_path, "--array=0,2", SCRIPT, *words)
    assert slurm.wait(array)[array] == {"FAILED"}
    assert "the array is not 0 to N-1; say by MAMBA_DIST_TASKS=N" in logged(tmp_path)
    array = submit(slurm, tmp_path, "--array=0,2", SCRIPT, *words, MAMBA_DIST_TASKS="3")
    slurm.wait(array)
    merge = submit(slurm, tmp_path, SCRIPT, *words, "--merge")
    assert slurm.wait(merge)[merge] == {"FAILED"}
    assert "run --task 1/3 again" in logged(tmp_path)
    array = submit(slurm, tmp_path, "--array=1", SCRIPT, *words, MAMBA_DIST_TASKS="3")
    merge = submit(slurm, tmp_path, f"--dependency=afterok:{array}", SCRIPT, *words, "--merge")
    assert slurm.wait(array, merge) == {array: {"COMPLETED"}, merge: {"COMPLETED"}}
    assert (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.slow
def test_a_task_that_is_warned_of_its_time_limit_is_requeued_and_goes_on(
    slurm: LocalSlurm, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", files=20)
    words = command((corpus, paths[1]), tmp_path / "set")
    job = submit(slurm, tmp_path, "--array=0-0", SCRIPT, *words)
    journals = ".partial-*/journal-0-of-1.jsonl"
    wait_until(lambda: any((tmp_path / "set").glob(journals)))
    # As SLURM sends it before the limit, which it looks at twice a minute only.
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_0")
    wait_until(lambda: slurm.states(job) == {"PENDING"})
    [journal] = (tmp_path / "set").glob(journals)
    done = journal.read_bytes().count(b"\n")
    assert 0 < done < 20
    slurm.start_soon(f"{job}_0")
    assert slurm.wait(job)[job] == {"COMPLETED"}, logged(tmp_path)
    assert "start 2 of job" in logged(tmp_path)
    assert "were done by an earlier run" in logged(tmp_path)
    assert journal.read_bytes().count(b"\n") == 20


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
