"""One data set by several tasks, on as many machines: each makes the units of its share.

A share is fixed beforehand (every count-th unit), so that tasks need not talk to each other. They
share the staging folder, each with a journal of its own; what is finished counts whoever did it,
and a plain run does what is left.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mamba_dist.errors import DataError

_NAMED_TASKS = 20


@dataclass(frozen=True)
class Share:
    """The units whose index leaves `index` when divided by `count`; 0 <= index < count.

    Neighbouring units go to different tasks, since large files and hard text come in runs.
    """

    index: int
    count: int

    def has(self, unit: int) -> bool:
        """Whether a unit belongs to it."""
        return unit % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_share(text: str) -> Share:
    """The share that "I/N" names.

    Raises:
        DataError: it names none.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(
            f"--task {text} is none of several tasks; expected I/N with I from 0 to N-1, such as "
            "0/8 and 7/8"
        )
    return Share(int(index), int(count))


def check_all_made(missing: Collection[int], *, units: int, counts: Iterable[int]) -> None:
    """Nothing, if no unit is missing. `counts` are the numbers of tasks that have been at it.

    Raises:
        DataError: the message names the tasks to run again.
    """
    if not missing:
        return
    tasks = [
        str(Share(index, count))
        for count in sorted(counts)
        for index in sorted({unit % count for unit in missing})
    ]
    named = ", ".join(tasks[:_NAMED_TASKS]) + " …" * (len(tasks) > _NAMED_TASKS)
    again = f"run --task {named} again" if tasks else "no --task has run with these settings"
    raise DataError(
        f"{len(missing)} of {units} units are not made yet; {again}, or let this command do them "
        "without --merge"
    )
