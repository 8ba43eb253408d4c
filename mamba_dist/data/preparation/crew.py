"""Tasks shared out among workers; one that dies is replaced, and its task tried once more.

A worker may die of anything: a signal, a crash in a library, the kernel's out-of-memory killer.
What it was doing then stands in its trace, memory that it shares with its parent.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from mamba_dist.data.workers import Worker, WorkerFailure, start_workers, stop_workers
from mamba_dist.errors import DataError

_NUMBERS = 4


class Trace:
    """Numbers that a worker keeps current, and that can be read after it was killed."""

    def __init__(self) -> None:
        # Of the context that starts the workers: its memory passes to them as it is.
        self._cells = multiprocessing.get_context("spawn").RawArray("q", 1 + _NUMBERS)

    def note(self, *numbers: int) -> None:
        """Leaves word of what is done now; four numbers."""
        self._cells[1:] = numbers

    def clear(self) -> None:
        """Forgets what was noted."""
        self.note(*[0] * _NUMBERS)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What was noted last."""
        return tuple(self._cells[1:])

    @property
    def is_ready(self) -> bool:
        """Whether the worker has begun its work."""
        return bool(self._cells[0])

    def set_ready(self) -> None:
        """To be called by a worker that is ready for its first task."""
        self._cells[0] = 1


@dataclass(frozen=True)
class Station:
    """What a worker of a crew starts with."""

    payload: Any
    trace: Trace


@dataclass(frozen=True)
class Attempt:
    """A task on its way to a worker. `is_second`: a worker died on it before."""

    task: Any
    is_second: bool = False


@dataclass(frozen=True)
class _Post:
    worker: Worker
    trace: Trace


class Crew:
    """`count` workers that run while the `with` block lasts.

    `target` is their function of (connection, Station): attempts come in through the pipe, one
    answer goes out for each. `place` says where in a task a worker was, by the numbers in its trace
    (zeros before it noted any). `notice` tells the user.
    """

    def __init__(
        self,
        target: Callable[[Connection, Station], None],
        payload: Any,
        *,
        count: int,
        place: Callable[[Any, Sequence[int]], str],
        notice: Callable[[str], None],
    ) -> None:
        self._target = target
        self._payload = payload
        self._place = place
        self._notice = notice
        self._count = count
        self._posts: list[_Post] = []
        self._failed_starts = 0

    def __enter__(self) -> "Crew":
        try:
            for _ in range(self._count):
                self._posts.append(self._start())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def answers(self, tasks: Sequence[Any]) -> Iterator[list[Any]]:
        """The answers to all tasks as they come, those that came together in one list.

        A worker gets its next task only after the list with its answer was taken: what the caller
        does before it asks for more is done before anything else begins.

        Raises:
            DataError: a worker reported a failure, two died on one task, or they cannot start.
            Answers that came with it were given before.
        """
        waiting = deque(Attempt(task) for task in tasks)
        busy: dict[Connection, tuple[_Post, Attempt]] = {}
        idle = list(self._posts)
        while waiting or busy:
            while idle and waiting:
                post, attempt = self._alive(idle.pop()), waiting.popleft()
                busy[post.worker.connection] = post, attempt
                _send(post, attempt)
            answers: list[Any] = []
            failure: DataError | None = None
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                post, attempt = busy.pop(connection)
                try:
                    answers.append(_receive(post))
                    self._failed_starts = 0
                except DataError as error:
                    failure = error
                except (EOFError, OSError):
                    try:
                        waiting.appendleft(self._after_death(post, attempt))
                        post = self._replace(post)
                    except DataError as error:
                        failure = error
                idle.append(post)
            if answers:
                yield answers
            if failure is not None:
                raise failure

    def _start(self) -> _Post:
        trace = Trace()
        try:
            [worker] = start_workers(self._target, [Station(self._payload, trace)])
        except OSError as error:
            raise DataError(
                f"cannot start a worker process: {error.strerror or error}; give fewer --workers"
            ) from error
        return _Post(worker, trace)

    def _alive(self, post: _Post) -> _Post:
        """A post whose worker did not die while it had nothing to do, which no task is to blame
        for. One that never began shows itself at its first task.
        """
        if post.worker.process.is_alive() or not post.trace.is_ready:
            return post
        end = post.worker.describe_end()
        self._notice(f"a worker died between two tasks ({end}); another is started")
        return self._replace(post)

    def _replace(self, dead: _Post) -> _Post:
        stop_workers([dead.worker])
        fresh = self._start()
        self._posts[self._posts.index(dead)] = fresh
        return fresh

    def _after_death(self, post: _Post, attempt: Attempt) -> Attempt:
        """The next attempt at the dead worker's task."""
        end = post.worker.describe_end()
        if not post.trace.is_ready:
            self._failed_starts += 1
            if self._failed_starts > 1:
                raise DataError(
                    f"workers die before their first task ({end}); give fewer --workers if memory "
                    "is short, and run the same command again to continue"
                )
            self._notice(f"a worker died before its first task ({end}); another is started")
            return attempt
        place = self._place(attempt.task, post.trace.numbers)
        if attempt.is_second:
            raise DataError(
                f"two workers died on {attempt.task}, the second {place} ({end}); if it is always "
                "there, mend that input or --exclude it; if memory is short, give fewer --workers. "
                "What the others finished is kept: run the same command again to continue"
            )
        self._notice(f"a worker died {place} ({end}); a new one tries {attempt.task} once more")
        return Attempt(attempt.task, is_second=True)

    def _stop(self) -> None:
        stop_workers([post.worker for post in self._posts])


def _send(post: _Post, attempt: Attempt) -> None:
    post.trace.clear()
    try:
        post.worker.connection.send(attempt)
    except OSError:
        return  # it is dead, which is seen when its answer is read


def _receive(post: _Post) -> Any:
    answer = post.worker.connection.recv()
    if isinstance(answer, WorkerFailure):
        raise DataError(answer.message)
    return answer
