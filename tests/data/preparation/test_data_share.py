"""Several tasks on one data set, as machines with a shared disk run them."""

import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
from made_data import SilentListener, build, folder_bytes, make_request

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.durable import exclusive_lock, shared_lock
from mamba_dist.data.manifest import BackendProof
from mamba_dist.data.preparation.build import ShareResult, build_share
from mamba_dist.data.preparation.share import Share, parse_share
from mamba_dist.data.preparation.sources import DiscoveryOptions, cut_units, discover
from mamba_dist.data.preparation.staging import Staging
from mamba_dist.errors import DataError

UNIT_BYTES = 1100

# Starts when told, so that several start at the same instant, and waits for ever after some units.
TASK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from made_data import SilentListener, make_request
from mamba_dist.data.preparation.build import build_share
from mamba_dist.data.preparation.share import parse_share
from mamba_dist.errors import DataError

class Listener(SilentListener):
    def advanced(self, unit, record):
        super().advanced(unit, record)
        if self.units == int(sys.argv[6]):
            print("waits", flush=True)
            sys.stdin.readline()

if __name__ == "__main__":
    corpus, output, tokenizer = map(Path, sys.argv[1:4])
    request = make_request(corpus, output, tokenizer, unit_bytes=int(sys.argv[5]))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print(build_share(request, parse_share(sys.argv[4]), Listener()).units)
    except DataError as error:
        print(error)
"""


def start_task(
    tmp_path: Path, share: str, *paths: Path, unit_bytes: int = UNIT_BYTES, wait_after: int = 0
) -> "subprocess.Popen[str]":
    """A task in a process of its own, about to begin."""
    script = tmp_path / "task.py"
    script.write_text(TASK.format(tests=str(Path(__file__).parents[1])))
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, paths), share, str(unit_bytes), str(wait_after)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def begin(processes: "list[subprocess.Popen[str]]") -> None:
    """Lets all begin at once."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def finish(processes: "list[subprocess.Popen[str]]") -> list[str]:
    """Lets all begin at once; what each says in the end."""
    begin(processes)
    return [process.communicate(timeout=60)[0].strip() for process in processes]


def units_of(corpus: Path, *shares: str) -> int:
    """How many units these shares have together; of all units without any."""
    units = cut_units(discover([corpus], DiscoveryOptions()).files, unit_bytes=UNIT_BYTES)
    chosen = [parse_share(share) for share in shares or ("0/1",)]
    return sum(any(share.has(unit.index) for share in chosen) for unit in units)


def task(
    corpus: Path, output: Path, tokenizer: Path, share: str, **options: object
) -> tuple[ShareResult, SilentListener]:
    listener = SilentListener()
    request = make_request(corpus, output, tokenizer, **{"unit_bytes": UNIT_BYTES, **options})
    return build_share(request, parse_share(share), listener), listener


def merge(corpus: Path, output: Path, tokenizer: Path, **options: object) -> SilentListener:
    listener = SilentListener()
    options = {"unit_bytes": UNIT_BYTES, "merge_only": True, **options}
    build(corpus, output, tokenizer, listener=listener, **options)
    return listener


def test_tasks_at_once_and_a_merge_give_what_one_process_gives(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    paths = (corpus_path, output, tokenizer_path)
    said = finish([start_task(tmp_path, f"{index}/3", *paths) for index in range(3)])
    assert list(map(int, said)) == [units_of(corpus_path, f"{index}/3") for index in range(3)]
    assert merge(corpus_path, output, tokenizer_path).units == 0
    assert folder_bytes(output) == folder_bytes(finished)
    made, _ = task(corpus_path, output, tokenizer_path, "0/3")
    assert made == ShareResult(0, was_complete=True)


def test_a_merge_names_the_tasks_that_are_missing_and_a_plain_build_does_their_work(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    for share in ("0/4", "2/4"):
        task(corpus_path, output, tokenizer_path, share)
    units, missing = units_of(corpus_path), units_of(corpus_path, "1/4", "3/4")
    assert 0 < missing < units
    said = rf"{missing} of {units} units .*; run --task 1/4, 3/4 again, or"
    with pytest.raises(DataError, match=said):
        merge(corpus_path, output, tokenizer_path)
    listener = SilentListener()
    build(corpus_path, output, tokenizer_path, listener=listener, unit_bytes=UNIT_BYTES)
    assert listener.units == missing
    assert folder_bytes(output) == folder_bytes(finished)


def test_a_merge_without_any_task_says_so_and_leaves_the_folder_as_it_was(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no --task has run with these settings"):
        merge(corpus_path, tmp_path / "set", tokenizer_path)
    assert list((tmp_path / "set").iterdir()) == []
    task(corpus_path, tmp_path / "set", tokenizer_path, "0/2")
    with pytest.raises(DataError, match="text_field was 'text', is 'body'"):
        merge(corpus_path, tmp_path / "set", tokenizer_path, text_field="body")


def test_a_killed_task_goes_on_where_it_was_and_takes_over_what_others_did(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    process = start_task(tmp_path, "0/2", corpus_path, output, tokenizer_path, wait_after=3)
    begin([process])
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.kill()
    process.communicate()
    [journal] = output.glob(".partial-*/journal-0-of-2.jsonl")
    assert journal.read_bytes().count(b"\n") == 3
    journal.write_bytes(journal.read_bytes() + b'{"unit": 1')  # as a kill in mid-write leaves it
    made, listener = task(corpus_path, output, tokenizer_path, "0/2")
    share = units_of(corpus_path, "0/2")
    assert (made.units, listener.units) == (share, share - 3)
    # Of a share cut otherwise only what nobody has made yet.
    made, listener = task(corpus_path, output, tokenizer_path, "1/3")
    share, others = units_of(corpus_path, "1/3"), units_of(corpus_path, "0/2", "1/3")
    assert (made.units, listener.units) == (share, others - units_of(corpus_path, "0/2"))
    task(corpus_path, output, tokenizer_path, "1/2")
    merge(corpus_path, output, tokenizer_path)
    assert folder_bytes(output) == folder_bytes(finished)


def test_a_merge_drops_a_damaged_part_which_its_task_then_makes_again(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    task(corpus_path, output, tokenizer_path, "0/1")
    part = min(output.glob(".partial-*/parts/*.part"))
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(DataError, match=r"changed since it was written.*; it was dropped: run the"):
        merge(corpus_path, output, tokenizer_path)
    _, listener = task(corpus_path, output, tokenizer_path, "0/1")
    assert listener.units == 1
    # What tasks have made stays, though it is to replace something.
    assert merge(corpus_path, output, tokenizer_path, overwrite=True).units == 0
    assert folder_bytes(output) == folder_bytes(finished)


def test_a_task_and_a_whole_build_keep_out_of_each_others_way(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    task(corpus_path, output, tokenizer_path, "0/2")
    with shared_lock(output):  # as a running task holds it
        with pytest.raises(DataError, match="another process is writing into"):
            build(corpus_path, output, tokenizer_path, unit_bytes=UNIT_BYTES)
        with pytest.raises(DataError, match="another process is writing into"):
            merge(corpus_path, output, tokenizer_path)
        task(corpus_path, output, tokenizer_path, "1/2")
    with (
        exclusive_lock(output),
        pytest.raises(DataError, match="another process is writing into"),
    ):
        task(corpus_path, output, tokenizer_path, "1/2")
    [staging] = output.glob(".partial-*")
    with (
        exclusive_lock(staging, name=".task-1-of-2.lock"),
        pytest.raises(DataError, match="another process is doing task 1/2"),
    ):
        task(corpus_path, output, tokenizer_path, "1/2")


def test_of_tasks_with_different_settings_that_start_at_once_one_kind_is_refused(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    paths = (corpus_path, output, tokenizer_path)
    processes = [
        start_task(tmp_path, f"{index}/4", *paths, unit_bytes=UNIT_BYTES + index % 2)
        for index in range(4)
    ]
    said = finish(processes)
    refused = [text for text in said if "unfinished data set made with other settings" in text]
    assert len(refused) == 2
    assert all("unit_bytes was 110" in text for text in refused)
    assert len(list(output.glob(".partial-*"))) == 1


def test_tasks_need_a_tokenizer_that_is_there(corpus_path: Path, tmp_path: Path) -> None:
    request = make_request(corpus_path, tmp_path / "set", None)
    with pytest.raises(DataError, match=r"cannot train one tokenizer; .*train_tokenizer\.py"):
        build_share(request, Share(0, 2), SilentListener())
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("text", ["", "3", "8/8", "-1/8", "1/0", "a/b", "1/2/3"])
def test_a_task_that_is_none_is_explained(text: str) -> None:
    with pytest.raises(DataError, match="expected I/N with I from 0 to N-1"):
        parse_share(text)


def test_every_fast_backend_that_made_parts_stands_in_the_manifest_once(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    task(corpus_path, output, tokenizer_path, "0/2")
    task(corpus_path, output, tokenizer_path, "1/2")
    [staging] = output.glob(".partial-*")
    proofs = [BackendProof("fast", v, "tokenizers 0.1", 9, 9, 9, 9) for v in ("1.1", "1.0")]
    for proof in (*proofs, *proofs):
        Staging(staging).note_backend(proof)
    merge(corpus_path, output, tokenizer_path)
    manifest = open_dataset(output).manifest
    assert [manifest.backend, *manifest.more_backends] == sorted(proofs, key=astuple)
