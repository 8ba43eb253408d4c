"""How the settings and inputs of two builds differ, in words."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

_NAMED_DIFFERENCES = 3


def setting_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What was set otherwise, each said in words."""
    return [
        f"{key} was {before.get(key)!r}, is {now[key]!r}"
        for key in now
        if before.get(key) != now[key]
    ]


def input_differences(before: Sequence[list[Any]], now: Sequence[list[Any]]) -> list[str]:
    """How the input files differ, in words.

    Entries are a name, the size, what tells the content, the format and the compression; None,
    or left out at the end, is not known and equals all.
    """
    old, new = _by_name(before), _by_name(now)
    both = [key for key in new if key in old]
    changes = {
        "added": [key for key in new if key not in old],
        "removed": [key for key in old if key not in new],
        "changed": [key for key in both if _differ(old[key][:2], new[key][:2])],
        "read in another format": [key for key in both if _differ(old[key][2:], new[key][2:])],
    }
    found = [
        f"{len(keys)} input files {what}: "
        + ", ".join(name for name, _ in keys[:_NAMED_DIFFERENCES])
        + " …" * (len(keys) > _NAMED_DIFFERENCES)
        for what, keys in changes.items()
        if keys
    ]
    if not found and [entry[0] for entry in before] != [entry[0] for entry in now]:
        found = ["the input files come in another order"]
    return found


def _by_name(entries: Sequence[list[Any]]) -> dict[tuple[str, int], list[Any]]:
    """What is known of each file; files in different folders may have one name."""
    seen: Counter[str] = Counter()
    known: dict[tuple[str, int], list[Any]] = {}
    for name, *rest in entries:
        known[name, seen[name]] = rest
        seen[name] += 1
    return known


def _differ(before: list[Any], now: list[Any]) -> bool:
    # The shorter list is an earlier version's.
    return any(None not in (old, new) and old != new for old, new in zip(before, now, strict=False))
