"""tools/run_status.py: what a run folder alone tells, in every state that a run can be in."""

import fcntl
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_script

from mamba_dist.checkpoint.layout import remove_checkpoint
from mamba_dist.commands import run_state
from mamba_dist.commands.run_status import main
from mamba_dist.telemetry.log import RankLog, log_file
from mamba_dist.telemetry.metrics import METRICS_FILE
from mamba_dist.telemetry.starts import LOCK, STARTS_FILE, StartsFile

HERE = socket.gethostname()


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 10 / step,
        "skipped_steps": 0,
        "tokens": 100 * step,
        "tokens_per_s": 50.0,
        "step_s": 2.0,
        **changes,
    }


def begin(run_dir: Path, *, host: str = HERE, ranks: int = 4, step: int = 0) -> StartsFile:
    starts = StartsFile(run_dir)
    starts.begin(hosts=[host], ranks=ranks, launcher="srun", job="77", versions={})
    starts.train(first_step=step, total_steps=1000)
    return starts


def checkpoint(run_dir: Path, step: int, saved_at: float) -> None:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"manifest": {"saved_at": saved_at}}))
    (folder / "rank-00000.safetensors").write_bytes(bytes(1_500_000))


def write_metrics(run_dir: Path, *records: dict[str, Any]) -> None:
    (run_dir / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    with (run_dir / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was stopped once, and goes on from step 100; it went back once."""
    path = tmp_path / "run"
    path.mkdir()
    begin(path).end("stopped", detail="SIGUSR1", exit_code=75, step=100)
    begin(path, step=100)
    write_metrics(
        path,
        record(100, skipped_steps=1),
        {"step": 100, "val_loss": 0.5, "val_tokens": 9, "seconds": 10.0},
        record(180, skipped_steps=3),
        {"step": 100, "rolled_back_from": 180, "first_skipped_sample": 0, "last_skipped_sample": 9},
        record(180, skipped_steps=2),
        {"step": 200, "val_loss": 0.25, "val_tokens": 9, "seconds": 10.0},
        record(200, loss=0.125),
    )
    checkpoint(path, 150, time.time() - 9000)
    checkpoint(path, 200, time.time() - 3900)
    (path / "checkpoints/step-00000300.partial").mkdir()
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """The lines by their first word; those of starts by their number."""
    assert main([str(each) for each in arguments]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_a_run_that_goes_on_tells_how_far_it_is(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(run_dir):
        found = told(capsys, run_dir)
    assert found["state"].startswith(f"running on {HERE} (4 ranks, srun, job 77), last sign of")
    assert found["step"] == "200 of 1,000 (20.0 %)"
    assert found["tokens"] == "20,000 trained on"
    assert found["loss"] == "0.1250; validation 0.2500 at step 200"
    assert found["speed"] == "50 tokens/s, 2 s a step"
    # 800 steps of 2 s, and of 0.1 s for the validation of each.
    assert found["ETA"].startswith("28 min 0 s, ")
    assert found["skipped"] == "3 steps; 1 rollbacks"
    assert found["checkpoint"] == (
        "step 200, 1 h 5 min old, 1.5 MB in 2 files, committed (not verified); 2 in all"
    )
    assert found["restarts"] == "1"
    assert found["1"].endswith("from step 0 to 100; stopped: SIGUSR1 (exit code 75)")
    assert found["2"].endswith("from step 100; goes on")


def test_a_start_without_an_end_was_killed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, run_dir)
    assert found["state"].startswith("not running: killed, or its node was lost, last sign of life")
    assert found["2"].endswith("from step 100; killed, or its node was lost")
    assert "ETA" not in found


def test_of_a_free_lock_seen_from_another_host_nothing_is_claimed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run_dir, host="elsewhere", step=200)
    found = told(capsys, run_dir)
    assert found["state"].startswith("unknown from this host on elsewhere (4 ranks")
    assert found["3"].endswith("goes on, or was killed")
    # The one before is over, since a later one had the lock.
    assert found["2"].endswith("killed, or its node was lost")


def test_the_rank_whose_log_has_the_error_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    crash = "RuntimeError: connection closed by peer"
    begin(run_dir, step=200).end("crash", detail=crash, exit_code=1, step=210)
    for rank in range(3):
        log = RankLog(log_file(run_dir, rank))
        log.say("END", "exit code 0, of a start before", at=now - 100)
        own = "exit code 2 after step 210, mistake: shard 7 is damaged\nmore"
        log.say("END", own if rank == 1 else f"exit code 1, crash: {crash}", at=now + 9 - rank)
    assert main([str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        f"         ranks 0, 2: exit code 1, crash: {crash}, see {log_file(run_dir, 0)}",
        "         rank 1: exit code 2 after step 210, mistake: shard 7 is damaged, see "
        f"{log_file(run_dir, 1)}",
        "         rank 3: no word of an end: killed, or the node was lost, see "
        f"{log_file(run_dir, 3)}",
    ]


def test_a_rank_that_was_killed_is_named_however_many_others_tell_of_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gloo's message to each rank has a port of its own."""
    begin(run_dir, ranks=8, step=200).end("crash", detail="closed", exit_code=1, step=210)
    for rank in range(7):
        RankLog(log_file(run_dir, rank)).say("END", f"crash: closed by [127.0.0.1]:{rank}")
    assert main([str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == (
        f"         rank 7: no word of an end: killed, or the node was lost, see "
        f"{log_file(run_dir, 7)}"
    )
    assert sum("closed by" in line for line in lines) == 3


def test_a_rank_whose_clock_is_behind_has_its_say(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run_dir, ranks=2, step=200).end("crash", detail="closed", exit_code=1, step=None)
    for rank, behind_s in enumerate((0.0, 100.0)):
        log = RankLog(log_file(run_dir, rank))
        for kind, text in (("END", "before"), ("START", "again"), ("END", f"error {rank}")):
            log.say(kind, text, at=time.time() - behind_s)
    assert main([str(run_dir)]) == 0
    assert "rank 1: error 1, see" in capsys.readouterr().out
    # One that was killed after it began is not told by the end of the start before.
    log.say("START", "again")
    begin(run_dir, ranks=2, step=200).end("crash", detail="closed", exit_code=1, step=None)
    assert main([str(run_dir)]) == 0
    assert "rank 1: no word of an end" in capsys.readouterr().out


def test_a_run_that_ended_well_shows_no_faults(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run_dir, step=200).end("finished", detail="", exit_code=0, step=1000)
    found = told(capsys, run_dir)
    assert found["state"].startswith("not running: finished, ")
    # Its records may end earlier than it did.
    assert found["step"] == "1,000 of 1,000 (100.0 %)"
    assert "rank" not in found
    assert "ranks" not in found


def test_a_copy_that_cannot_be_written_tells_the_same_in_json(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    (run_dir / LOCK).touch()
    shutil.copytree(run_dir, copy)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert main([str(copy), "--json"]) == 0
    finally:
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["step"], status["total_steps"]) == ("killed", 200, 1000)
    assert [start["reason"] for start in status["starts"]] == ["stopped", None]
    assert status["checkpoint"]["step"] == 200
    assert abs(status["checkpoint"]["saved_at"] - (time.time() - 3900)) < 60


def test_what_a_rollback_took_back_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path)
    back = {"step": 100, "rolled_back_from": 180}
    write_metrics(tmp_path, record(100), record(180, skipped_steps=9), back)
    found = told(capsys, tmp_path)
    assert found["step"] == "100 of 1,000 (10.0 %)"
    assert found["tokens"] == "10,000 trained on"
    assert found["loss"] == "0.1000"
    assert found["skipped"] == "0 steps; 1 rollbacks"


def test_steps_that_are_trained_again_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they are logged at other steps than before."""
    begin(tmp_path)
    begin(tmp_path, step=100)
    lost = {"step": 190, "val_loss": 0.5, "val_tokens": 9, "seconds": 10.0}
    before = [record(step, skipped_steps=1) for step in (100, 150, 200)]
    write_metrics(tmp_path, *before, lost, record(120), record(140))
    found = told(capsys, tmp_path)
    assert found["step"] == "140 of 1,000 (14.0 %)"
    assert found["loss"] == f"{10 / 140:.4f}"
    assert found["skipped"] == "1 steps; 0 rollbacks"


def test_a_start_that_ended_before_its_first_step_is_where_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path)
    begin(tmp_path, step=150).end("crash", detail="x", exit_code=1, step=None)
    write_metrics(tmp_path, record(150), record(180))
    found = told(capsys, tmp_path)
    assert (found["step"], found["tokens"]) == ("150 of 1,000 (15.0 %)", "15,000 trained on")


def test_what_cannot_be_read_hides_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path, ranks=1).end("finished", detail="", exit_code=0, step=7)
    with (tmp_path / STARTS_FILE).open("ab") as starts:
        starts.write(b'\0\xff\n{"event": "start"}\n{"event": "end", "of": [1]}\n7\n')
        starts.write(b'{"event": "start", "at": "yesterday"}\n' + b"[" * 100_000 + b"\n")
        whole = {"at": 1e9, "hosts": [], "launcher": "python", "job": None, "pid": 1}
        wrong = {**whole, "event": "start", "ranks": "two", "versions": {}}
        starts.write(json.dumps(wrong).encode() + b"\n")
    write_metrics(tmp_path, record(7, tokens_per_s=float("nan"), loss=float("inf")))
    with (tmp_path / METRICS_FILE).open("ab") as metrics:
        metrics.write(b'\0\xff\n3\n{"step": 1, "lo{"step": 2}\n{"loss": 1}\n{"step": 8, "cut')
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    found = told(capsys, tmp_path)
    assert (found["step"], found["loss"]) == ("7 of 1,000 (0.7 %)", "not finite")
    assert found["unreadable"] == "4 lines of metrics.jsonl"
    assert found["checkpoint"].startswith("step 5, 0 s old")
    assert "not whole: without its manifest" in found["checkpoint"]
    assert main([str(tmp_path), "--json"]) == 0
    assert "NaN" not in capsys.readouterr().out


def test_a_folder_of_a_job_that_waits_says_that_nothing_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "submissions/0001").mkdir(parents=True)
    assert told(capsys, tmp_path)["state"] == "unknown: no start is recorded"
    (tmp_path / "submissions/0001/submit.json").write_text('{"job": "4711"}')
    (tmp_path / STARTS_FILE).touch()
    found = told(capsys, tmp_path)
    assert found["state"].startswith("unknown: no start is recorded; last submitted as job 4711")
    assert found["starts"] == "none is recorded in starts.jsonl"


def test_a_run_beyond_what_its_last_start_was_to_do_says_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = begin(tmp_path, ranks=1)
    start.train(first_step=12, total_steps=4)
    write_metrics(tmp_path, record(12))
    assert told(capsys, tmp_path)["step"] == "12; the last start that trained was to end at 4"


def test_a_checkpoint_that_retention_deletes_meanwhile_is_no_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 6):
        checkpoint(tmp_path, step, time.time())
    listed = run_state.committed_steps

    def then_deleted(run_dir: Path) -> list[int]:
        steps = listed(run_dir)
        if 6 in steps:
            remove_checkpoint(run_dir, 6)
        return steps

    monkeypatch.setattr(run_state, "committed_steps", then_deleted)
    assert told(capsys, tmp_path)["checkpoint"].startswith("step 5, ")


def test_logs_that_cannot_be_read_are_a_mistake(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file(run_dir, 0).mkdir(parents=True)
    assert main([str(run_dir), "--log"]) == 2
    assert "rank-00000.log: cannot be read (Is a directory)" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_crash(run_dir: Path) -> None:
    log = log_file(run_dir, 0)
    log.parent.mkdir()
    log.write_text("2026-11-27T02:00:48.123Z INFO x\n" * 20_000)
    command = f"{sys.executable} tools/run_status.py {run_dir} --log | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("2026-11-27 02:00:48.123 x\n", "")


def test_all_problems_of_the_last_start_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detail = "2 problems at the start:\n  1. no data\n  2. no room"
    for _ in range(2):
        begin(tmp_path, ranks=1).end("mistake", detail=detail, exit_code=2, step=None)
        time.sleep(0.002)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("mistake: 2 problems at the start: (exit code 2)")
    assert lines[-2:] == ["           1. no data", "           2. no room"]
    assert lines[-4].endswith("(exit code 2)"), "of earlier ones the first line is enough"


def test_a_run_of_an_older_version_tells_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path, record(7))
    found = told(capsys, tmp_path)
    assert found["step"] == "7"
    assert found["starts"] == "none is recorded in starts.jsonl"
    assert main([str(tmp_path), "--log"]) == 2
    assert "there is no folder logs" in capsys.readouterr().err


def test_the_merged_log_is_printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        RankLog(log_file(run_dir, rank)).say("INFO", "saved", at=0.0)
    assert main([str(run_dir), "--log"]) == 0
    assert capsys.readouterr().out == "1970-01-01 00:00:00.000 [ranks 0-1] saved\n"


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_what_is_no_run_folder_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / name) in said
    assert "name the run's (training.run_dir)" in said


def test_it_answers_without_torch(run_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mamba_dist.commands.run_status import main\n"
        "main(sys.argv[1:])\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'deepspeed'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "200 of 1,000" in run_script("tools/run_status.py", run_dir, cwd=tmp_path).stdout
