"""One line of JSON lines to a record: by orjson where it is installed, always as `json` reads it.

orjson is used for what it reads exactly as `json` does and left out of everything else: a line
that it refuses (NaN, lone surrogates, a number beyond a double, a byte order mark, errors of all
kinds) or whose record holds no text is read again by `json`, whose word is final. What orjson
reads otherwise are integers beyond 64 bits, which become floats: they are never the text, and an
id that is a float is read again. And nesting: `json` gives up at the interpreter's recursion limit,
orjson at 1,024 levels.
"""

import functools
import importlib
import json
from collections.abc import Callable
from typing import Any, Final

# Far below every limit on nesting.
_CERTAINLY_SHALLOW: Final = 200
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


def read_record(
    line: bytes, text_field: str, *, first: bool, id_field: str | None = None
) -> object:
    """The value of a line; `first` lines of a file may begin with a byte order mark.

    Equal to `json`'s value wherever that has text in `text_field`, but for integers beyond 64
    bits in fields other than `id_field`.

    Raises:
        UnicodeDecodeError: the line is not UTF-8.
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    fast = _fast_loads()
    if fast is not None:
        try:
            record = fast(line.removeprefix(_BYTE_ORDER_MARK) if first else line)
        except ValueError:
            pass  # json decides, and says why
        else:
            if (
                isinstance(record, dict)
                and isinstance(record.get(text_field), str)
                and not isinstance(record.get(id_field), float)
                and _is_shallow(line, record)
            ):
                return record
            # A record may take forty times its line's bytes, and is read once more.
            del record
    return json.loads(line.decode("utf-8-sig" if first else "utf-8"))


def _is_shallow(line: bytes, record: dict[str, Any]) -> bool:
    # From cheap to dear: most records hold strings only, and most others few brackets.
    if not any(isinstance(value, dict | list) for value in record.values()):
        return True
    if line.count(b"[") + line.count(b"{") <= _CERTAINLY_SHALLOW:
        return True
    level: list[Any] = [record]
    for _ in range(_CERTAINLY_SHALLOW):
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for values in inside for child in values if isinstance(child, dict | list)]
        if not level:
            return True
    return False


@functools.cache
def _fast_loads() -> Callable[[bytes], Any] | None:
    try:
        loads: Callable[[bytes], Any] = importlib.import_module("orjson").loads
    except ImportError:
        return None
    return loads
