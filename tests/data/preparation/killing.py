"""Builds that are killed at their n-th change of the disk. Run as a script, it forks one build for
each line of JSON on stdin, since a fresh process a build would import everything again.

A change is a file opened for writing, an fsync, a rename, a removal, a new folder. The kill comes
just before it, so that walking over all n visits every state that a kill -9 can leave, but for the
middle of a write.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_data import SilentListener, make_request

from mamba_dist.data.preparation.build import build_dataset, build_share
from mamba_dist.data.preparation.share import parse_share

_CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir"})


class _Counter:
    """Counts this process's changes of the disk below `folder`, and kills it before the last."""

    def __init__(self, folder: str, last: int | None) -> None:
        self.changes = 0
        self._folder = folder
        self._last = last
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self._count()
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and self._is_written(*arguments)):
            self._count()

    def _is_written(self, path: object, _: object, flags: int) -> bool:
        is_ours = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)
        return is_ours and bool(flags & (os.O_WRONLY | os.O_RDWR))

    def _count(self) -> None:
        self.changes += 1
        if self.changes == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


class _Listener(SilentListener):
    def __init__(self, output: Path) -> None:
        super().__init__()
        self.leftovers = 0
        self._output = output

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        self.leftovers = len(list(self._output.glob(".partial-*/parts/.unit*")))


@dataclass(frozen=True)
class Outcome:
    """How a build ended. `units`, `changes` and `leftovers`, the half-written parts that lay there
    when the work began, are None if it was killed.
    """

    killed: bool
    units: int | None
    changes: int | None
    leftovers: int | None


class BuildServer:
    """Forks builds of one corpus with one tokenizer."""

    def __init__(self, process: "subprocess.Popen[str]", corpus: Path, tokenizer: Path) -> None:
        self._process = process
        self._corpus = corpus
        self._tokenizer = tokenizer

    def build(
        self, output: Path, *, kill_at: int | None = None, share: str = "", **options: object
    ) -> Outcome:
        """A build into `output` (of one share, if given), killed at its change number `kill_at`,
        from 1.
        """
        order = {
            "arguments": [str(self._corpus), str(output), str(self._tokenizer)],
            "kill_at": kill_at,
            "share": share,
            "options": options,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer["status"] not in (0, signal.SIGKILL):
            raise AssertionError(answer)
        killed = answer["status"] == signal.SIGKILL
        return Outcome(killed, answer["units"], answer["changes"], answer["leftovers"])


@contextmanager
def build_server(corpus: Path, tokenizer: Path) -> Iterator[BuildServer]:
    """A process that forks builds while the block lasts."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # made_data.py lies where pytest has found it.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield BuildServer(process, corpus, tokenizer)
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _build(order, writer)
        os.close(writer)
        with os.fdopen(reader) as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        answer = json.loads(said) if said else {"units": None, "changes": None, "leftovers": None}
        print(json.dumps({"status": status, **answer}), flush=True)


def _build(order: dict[str, Any], writer: int) -> None:
    corpus, output, tokenizer = map(Path, order["arguments"])
    listener = _Listener(output)
    counter = _Counter(str(output), order["kill_at"])
    request = make_request(corpus, output, tokenizer, **order["options"])
    if order["share"]:
        build_share(request, parse_share(order["share"]), listener)
    else:
        build_dataset(request, listener)
    said = {
        "units": listener.units,
        "changes": counter.changes,
        "leftovers": listener.leftovers,
    }
    os.write(writer, json.dumps(said).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve()
