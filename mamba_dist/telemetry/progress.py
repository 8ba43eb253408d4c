"""Progress of a long task: a bar on a terminal, a plain line every few seconds anywhere else."""

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

_LINE_INTERVAL_S = 5.0


class Progress:
    """Shows how far a task has come; close it, or use it as a context manager."""

    def __init__(
        self,
        total: int | None,
        unit: str,
        *,
        description: str = "",
        enabled: bool = True,
        initial: int = 0,
        stream: TextIO | None = None,
        interval_s: float = _LINE_INTERVAL_S,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._total = total
        self._unit = unit
        self._description = description
        self._enabled = enabled
        self._initial = self._done = initial
        self._interval_s = interval_s
        self._begun_at = self._shown_at = time.monotonic()
        self._shown = initial
        self._bar: tqdm[Any] | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                unit=unit,
                unit_scale=unit == "B",
                desc=description or None,
                initial=initial,
                file=self._stream,
                dynamic_ncols=True,
            )

    def advance(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._shown_at >= self._interval_s:
            self._print_line()

    def advance_to(self, done: int) -> None:
        """Counts `done` units as done in all."""
        self.advance(done - self._done)

    def show(self, text: str) -> None:
        """Prints a line to stdout without tearing the bar, even when no progress is shown."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the display with the final count."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._done not in (self._initial, self._shown):
            self._print_line()
        self._enabled, self._bar = False, None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _print_line(self) -> None:
        now = time.monotonic()
        self._shown_at, self._shown = now, self._done
        rate = (self._done - self._initial) / max(now - self._begun_at, 1e-9)
        done, per_second = _number(self._done, self._unit), _number(rate, self._unit)
        share = total = ""
        if self._total:
            total = f"/{_number(self._total, self._unit)}"
            share = f" ({100 * self._done / self._total:.0f} %)"
        unit = "" if self._unit == "B" else f" {self._unit}"
        label = f"{self._description}: " if self._description else ""
        print(
            f"{label}{done}{total}{unit}{share}, {per_second}{unit}/s",
            file=self._stream,
            flush=True,
        )


def progress(
    total: int | None, unit: str, *, description: str = "", enabled: bool = True, initial: int = 0
) -> Progress:
    """A display of a task of `total` units on stderr; the unit "B" is shown as kB, MB, GB."""
    return Progress(total, unit, description=description, enabled=enabled, initial=initial)


def _number(value: float, unit: str) -> str:
    if unit == "B":
        for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= scale:
                return f"{value / scale:.1f} {name}"
        return f"{value:.0f} B"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
