import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

from mamba_dist.data.preparation.crew import Attempt, Crew, Station
from mamba_dist.data.workers import WorkerFailure
from mamba_dist.errors import DataError


def work(connection: Connection, station: Station) -> None:
    """Answers a number with its square; what else it does is in the payload."""
    orders: dict[str, object] = station.payload
    if "start" in orders and os.path.exists(str(orders["start"])):
        Path(str(orders["start"])).unlink()
        os._exit(4)
    if orders.get("never starts"):
        os._exit(4)
    station.trace.set_ready()
    while True:
        try:
            attempt: Attempt = connection.recv()
        except (EOFError, ConnectionError):
            return
        number = attempt.task
        station.trace.note(number, int(attempt.is_second), 0, 0)
        if number == orders.get("fatal") or (
            number == orders.get("once") and not attempt.is_second
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        failed = WorkerFailure(f"{number} is wrong") if number == orders.get("wrong") else None
        connection.send(failed or number * number)


def place(task: int, numbers: Sequence[int]) -> str:
    return f"at {numbers[0]} (second: {numbers[1]})"


def crew(notices: list[str], *, count: int = 2, **orders: object) -> Crew:
    payload = {name.replace("_", " "): order for name, order in orders.items()}
    return Crew(work, payload, count=count, place=place, notice=notices.append)


def collect(team: Crew, tasks: Sequence[int]) -> list[int]:
    return sorted(answer for answers in team.answers(tasks) for answer in answers)


def test_every_task_is_answered_by_any_number_of_workers() -> None:
    for count in (1, 3):
        with crew([], count=count) as team:
            assert collect(team, range(20)) == [n * n for n in range(20)]


def test_a_task_that_a_worker_died_on_is_tried_once_more_by_a_new_one() -> None:
    notices: list[str] = []
    with crew(notices, count=1, once=3) as team:
        assert collect(team, range(6)) == [0, 1, 4, 9, 16, 25]
    assert notices == [
        "a worker died at 3 (second: 0) (killed by SIGKILL (out of memory?)); "
        "a new one tries 3 once more"
    ]


def test_a_task_that_two_workers_died_on_ends_it_with_the_place_and_the_others_are_kept() -> None:
    answers: list[int] = []
    notices: list[str] = []
    # Alone: another might still be at its first task when the second dies.
    with crew(notices, count=1, fatal=3) as team:
        given = team.answers(range(4))
        with pytest.raises(DataError, match=r"two workers died on 3, the second at 3 \(second: 1"):
            answers.extend(answer for together in given for answer in together)
    assert sorted(answers) == [0, 1, 4]
    assert len(notices) == 1


def test_a_failure_that_is_explained_is_not_tried_again() -> None:
    notices: list[str] = []
    with crew(notices, wrong=2) as team, pytest.raises(DataError, match=r"^2 is wrong$"):
        collect(team, range(9))
    assert notices == []


def test_answers_that_came_together_with_a_failure_are_given_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(connections: list[Connection]) -> list[object]:
        while len(ready := wait(connections)) < len(connections):
            time.sleep(0.01)
        return ready

    with crew([], wrong=2) as team:
        assert collect(team, range(2)) == [0, 1]  # both have started
        monkeypatch.setattr("mamba_dist.data.preparation.crew.wait", late)
        given = team.answers([3, 2])
        assert next(given) == [9]
        with pytest.raises(DataError, match=r"^2 is wrong$"):
            next(given)


def test_a_worker_that_dies_at_its_start_is_replaced_and_blames_no_task(tmp_path: Path) -> None:
    (tmp_path / "once").touch()
    notices: list[str] = []
    with crew(notices, count=1, start=str(tmp_path / "once")) as team:
        assert collect(team, range(3)) == [0, 1, 4]
    assert len(notices) == 1
    assert "before its first task (exit code 4, its own message is above)" in notices[0]


def test_workers_that_never_start_are_given_up() -> None:
    with crew([], never_starts=True) as team, pytest.raises(DataError, match="die before their"):
        collect(team, range(3))


def test_a_worker_that_dies_between_two_tasks_blames_none() -> None:
    notices: list[str] = []
    with crew(notices, count=1) as team:
        given = team.answers(range(3))
        assert next(given) == [0]
        [post] = team._posts
        post.worker.process.kill()
        post.worker.process.join()
        assert [answer for together in given for answer in together] == [1, 4]
    assert notices == [
        "a worker died between two tasks (killed by SIGKILL (out of memory?)); another is started"
    ]


def test_nothing_new_begins_before_an_answer_was_taken() -> None:
    with crew([], count=1) as team:
        [post] = team._posts
        for [answer] in team.answers(range(1, 5)):
            time.sleep(0.02)  # time to begin the next, which would be noted
            assert post.trace.numbers[0] ** 2 in (0, answer)


def test_nobody_outlives_a_crew() -> None:
    with crew([], count=2) as team:
        processes = [post.worker.process for post in team._posts]
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)
