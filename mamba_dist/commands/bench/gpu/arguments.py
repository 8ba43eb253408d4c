"""What the commands of the GPU benchmarks share: a type of arguments, and how a command is told."""

import argparse
import shlex
from collections.abc import Iterable, Sequence

Option = tuple[str, object]
"""Name and value. None is one that is not given, True one without a value, a list several words."""


def names(text: str) -> tuple[str, ...]:
    """The names that `text` lists with commas between, each once.

    Raises:
        argparse.ArgumentTypeError: one of them is empty.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in found:
        raise argparse.ArgumentTypeError(f"{text!r} is not names with commas between")
    return found


def in_full(name: str, options: Iterable[Option]) -> list[str]:
    """The words of a benchmark's command with every option, those that were not given included."""
    words = [name]
    for option, value in options:
        if value is None:
            continue
        words.append(option)
        if isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def command_lines(words: Sequence[str], in_full: Sequence[str]) -> str:
    """The command as it was given, and with everything that was in force, for a heading."""
    return (
        f"Command: `tools/bench.py {shlex.join(words)}`\n"
        f"In full: `tools/bench.py {shlex.join(in_full)}`\n"
    )
