import io
import sys

import pytest

from mamba_dist.telemetry.progress import Progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_lines_no_more_often_than_the_interval() -> None:
    out = io.StringIO()
    with Progress(100, "steps", description="training", stream=out, interval_s=1000) as shown:
        for _ in range(50):
            shown.advance()
    assert out.getvalue().startswith("training: 50/100 steps (50 %), ")
    assert out.getvalue().count("\n") == 1
    assert "\r" not in out.getvalue()


def test_every_line_says_how_far_the_task_has_come() -> None:
    out = io.StringIO()
    with Progress(None, "B", stream=out, interval_s=0, initial=1_000_000) as shown:
        shown.advance(500_000)
        shown.advance_to(3_000_000)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1.5 MB", "3.0 MB"]


def test_a_terminal_gets_a_bar_and_lines_do_not_tear_it(capsys: pytest.CaptureFixture[str]) -> None:
    out = Terminal()
    with Progress(10, "steps", description="training", stream=out) as shown:
        shown.advance(10)
        shown.show("step 10  loss 3.0")
    assert "training: 100%" in out.getvalue()
    assert "10/10" in out.getvalue()
    assert capsys.readouterr().out == "step 10  loss 3.0\n"


def test_progress_that_is_not_wanted_shows_nothing_but_the_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Terminal()
    with Progress(10, "steps", enabled=False, stream=out) as shown:
        shown.advance(10)
        shown.show("a record")
    assert out.getvalue() == ""
    assert capsys.readouterr().out == "a record\n"


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(5, "files", description="reading") as shown:
        shown.advance(5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("reading: 5/5 files (100 %)")
    assert not sys.stderr.isatty()
