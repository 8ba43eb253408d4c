"""Records in every sink: lines that can be parsed, events that TensorBoard reads, the console."""

import errno
import io
import json
import logging
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mamba_dist.telemetry.metrics import (
    METRICS_FILE,
    ConsoleSink,
    JsonlSink,
    Metrics,
    RollbackRecord,
    TrainRecord,
    ValidationRecord,
    read_metrics,
)
from mamba_dist.telemetry.progress import Progress
from mamba_dist.telemetry.tensorboard_sink import TensorBoardSink

TRAINED = TrainRecord(
    step=10,
    loss=3.25,
    learning_rate=1e-3,
    grad_norm=0.75,
    skipped_steps=0,
    tokens=4096,
    unlabelled_share=0.125,
    tokens_per_s=2000.0,
    tokens_per_s_per_device=1000.0,
    model_tflops_per_s=0.5,
    step_s=0.25,
    data_wait_s=0.125,
    peak_memory_gib=1.5,
)
VALIDATED = ValidationRecord(step=10, val_loss=3.5, val_tokens=512, seconds=1.25)


def write_lines(run_dir: Path, *records: TrainRecord | ValidationRecord) -> None:
    metrics = Metrics([JsonlSink(run_dir)])
    for record in records:
        metrics.write(record)
    metrics.close()


def test_every_field_of_a_record_can_be_read_back(tmp_path: Path) -> None:
    write_lines(tmp_path, TRAINED, VALIDATED)
    assert read_metrics(tmp_path) == [asdict(TRAINED), asdict(VALIDATED)]


def test_a_record_is_in_the_file_before_the_run_ends(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(VALIDATED)
    assert read_metrics(tmp_path) == [asdict(VALIDATED)]
    sink.close()


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_becomes_null(tmp_path: Path, value: float) -> None:
    write_lines(tmp_path, replace(TRAINED, loss=value, grad_norm=value))
    fields = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=no_constants)
    assert fields["loss"] is None
    assert fields["grad_norm"] is None
    assert fields["learning_rate"] == 1e-3


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    write_lines(tmp_path, TRAINED)
    write_lines(tmp_path, replace(TRAINED, step=20))
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20]


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path, TRAINED, VALIDATED)
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[1])):
        path.write_bytes(whole[:-cut])
        assert read_metrics(tmp_path) == [asdict(TRAINED)]


def test_a_run_resumed_after_a_cut_line_can_still_be_read(tmp_path: Path) -> None:
    write_lines(tmp_path, TRAINED, VALIDATED)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    write_lines(tmp_path, replace(TRAINED, step=20), replace(TRAINED, step=30))
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 20, 30]


def test_a_folder_without_a_run_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tensorboard_reads_the_scalars_at_their_steps(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in (10, 20):
        sink.write(replace(TRAINED, step=step, loss=step / 4))
    sink.write(VALIDATED)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 5.0)]
    assert [(e.step, e.value) for e in events.Scalars("validation/val_loss")] == [(10, 3.5)]
    fields = (asdict(TRAINED).keys() | asdict(VALIDATED).keys()) - {"step"}
    assert {tag.partition("/")[2] for tag in events.Tags()["scalars"]} == fields


def test_tensorboard_does_not_show_what_a_rollback_took_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, loss in ((10, 2.0), (20, 9.0), (30, 9.5)):
        sink.write(replace(TRAINED, step=step, loss=loss))
    sink.write(RollbackRecord(10, 30, 80, 239))
    sink.write(replace(TRAINED, step=20, loss=1.5))
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.0), (20, 1.5)]


def test_the_console_shows_what_a_person_looks_for(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(Progress(20, "steps", stream=io.StringIO()), 20)
    sink.write(TRAINED)
    sink.write(VALIDATED)
    sink.write(replace(VALIDATED, val_loss=1e4))  # exp of it overflows
    sink.close()
    trained, validated, _ = capsys.readouterr().out.splitlines()
    assert trained.startswith("step 10/20  loss 3.2500  lr 1.00e-03  grad norm 0.75")
    assert "2,000 tokens/s" in trained
    assert "validation loss 3.5000" in validated
    assert "perplexity 33.1" in validated


def test_every_sink_gets_every_record(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    metrics = Metrics([JsonlSink(first), JsonlSink(second)])
    metrics.write(TRAINED)
    metrics.close()
    assert read_metrics(first) == read_metrics(second) == [asdict(TRAINED)]


class FullDisk:
    """A disk that takes so many more bytes, under the files that are opened unbuffered."""

    def __init__(self, room: int) -> None:
        self.room = room

    def under(self, sink: JsonlSink) -> None:
        file, disk = sink._file, self

        class Limited:
            fileno, close = file.fileno, file.close

            def write(self, data: bytes) -> int:
                if not disk.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written = file.write(data[: disk.room])
                disk.room -= written
                return written

        sink._file = Limited()


def test_a_full_disk_loses_no_record_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mamba_dist"), "propagate", True)
    sink = JsonlSink(tmp_path)
    disk = FullDisk(room=30)
    disk.under(sink)
    metrics = Metrics([sink])
    for step in (1, 2, 3):
        metrics.write(replace(VALIDATED, step=step))
    assert caplog.text.count("JsonlSink cannot write its records") == 1
    assert "No space left" in caplog.text
    disk.room = 10**6
    metrics.write(replace(VALIDATED, step=4))
    assert caplog.text.count("writes its records again") == 1
    disk.room = 0
    metrics.write(replace(VALIDATED, step=5))
    metrics.close()
    assert "could not write its last records" in caplog.text
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_metrics_go_on_in_a_new_file_if_theirs_is_deleted(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    metrics = Metrics([sink])
    metrics.write(VALIDATED)
    (tmp_path / METRICS_FILE).unlink()
    metrics.write(replace(VALIDATED, step=11))
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [11]


def test_metrics_leave_a_folder_that_was_renamed_to_the_next_run(tmp_path: Path) -> None:
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    run.mkdir()
    metrics = Metrics([JsonlSink(run)])
    metrics.write(VALIDATED)
    run.rename(renamed)
    # Nowhere to go, until a save makes the folder again.
    metrics.write(replace(VALIDATED, step=11))
    run.mkdir()
    metrics.write(replace(VALIDATED, step=12))
    metrics.close()
    assert [record["step"] for record in read_metrics(renamed)] == [VALIDATED.step]
    assert [record["step"] for record in read_metrics(run)] == [11, 12]


def test_tensorboard_begins_another_file_after_its_folder_was_gone(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(VALIDATED)
    writer = sink._writer
    assert writer is not None

    def dead(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.add_scalar = dead
    # Its thread still writes otherwise, while the folder is deleted.
    writer.close()
    shutil.rmtree(tmp_path / "tensorboard")
    with pytest.raises(OSError, match="No space left"):
        sink.write(replace(VALIDATED, step=11))
    sink.write(replace(VALIDATED, step=12))
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert 12 in [event.step for event in events.Scalars("validation/val_loss")]
