"""A column of a table: checked when it is made, measured before its values are read.

Files come from elsewhere, so nothing that they say of where a value lies is trusted: Arrow's own
conversion to Python would follow a wrong offset out of the file.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

# The name of a struct's type may list hundreds of fields.
_DETAIL_CHARACTERS = 80


@dataclass(frozen=True)
class Unusable:
    """Stands for a value that is no text and no number, or that was not read, and says why."""

    fault: Literal["too long", "not UTF-8", "no text field"]
    detail: str = ""


class ColumnValues:
    """The values of an array: str, int, None, or Unusable for all others.

    A string of more than `most_bytes` bytes of UTF-8 is not read. `before` is the same column of
    the batch before: a dictionary that both share is checked and measured once.

    Raises:
        pa.ArrowInvalid: the array is damaged.
    """

    def __init__(
        self, array: pa.Array, *, most_bytes: int, before: "ColumnValues | None" = None
    ) -> None:
        self._most_bytes = most_bytes
        while isinstance(array, pa.ExtensionArray):
            array = array.storage
        self._indices, values = _parted(array)
        self._is_text = (
            pa.types.is_string(values.type)
            or pa.types.is_large_string(values.type)
            or pa.types.is_string_view(values.type)
        )
        self._is_readable = self._is_text or (
            pa.types.is_integer(values.type) or pa.types.is_null(values.type)
        )
        self._values = _as_bytes(values)
        # Of each of a dictionary's values.
        self._lengths: npt.NDArray[np.int64] | None = None
        if before is not None and before._indices is not None and before._holds(self._values):
            self._lengths = before._lengths
        else:
            # Of values that are not read, only whether they are there is asked.
            self._values.validate(full=self._is_readable)
            if self._indices is not None:
                self._lengths = self._measured(0, len(self._values))
        if self._indices is not None:
            self._indices.validate(full=True)
            _require_within(self._indices, len(self._values))

    def sizes(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Bytes of each of `count` strings from row `start` on; 0 for other values."""
        if self._indices is None or self._lengths is None:
            return self._measured(start, count)
        indices = self._indices.slice(start, count)
        sizes = np.zeros(len(indices), dtype=np.int64)
        is_valid = indices.is_valid().to_numpy(zero_copy_only=False)
        sizes[is_valid] = self._lengths[indices.drop_null().to_numpy(zero_copy_only=False)]
        return sizes

    def read(self, start: int, count: int) -> list[Any]:
        """The values of `count` rows from row `start` on."""
        if self._indices is None:
            return self._read(start, count)
        return [
            None if index is None else self._read(index, 1)[0]
            for index in self._indices.slice(start, count).to_pylist()
        ]

    def _read(self, start: int, count: int) -> list[Any]:
        values = self._values.slice(start, count)
        if not self._is_readable:
            other = Unusable("no text field", f"the value is {values.type}"[:_DETAIL_CHARACTERS])
            return [other if is_valid else None for is_valid in values.is_valid().to_pylist()]
        if not self._is_text:
            numbers: list[Any] = values.to_pylist()
            return numbers
        lengths = self._measured(start, count)
        if lengths.max(initial=0) <= self._most_bytes:
            return [_decoded(value) for value in values.to_pylist()]
        return [
            Unusable("too long") if length > self._most_bytes else _decoded(value.as_py())
            for length, value in zip(lengths, values, strict=True)
        ]

    def _measured(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Bytes of each of the values, which must be valid."""
        values = self._values.slice(start, count)
        if not self._is_text or not len(values):
            return np.zeros(len(values), dtype=np.int64)
        if pa.types.is_binary_view(values.type):
            # Arrow has no kernel for them: a view begins with its length, of 4 bytes of its 16.
            views = np.frombuffer(
                values.buffers()[1], "<i4", count=4 * len(values), offset=16 * values.offset
            )
            lengths = views[::4].astype(np.int64)
            lengths[~values.is_valid().to_numpy(zero_copy_only=False)] = 0
            return lengths
        found = pc.fill_null(pc.binary_length(values), 0)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def _holds(self, values: pa.Array) -> bool:
        """Whether these are the very same values, which no other may replace while this lives."""
        mine, others = self._values.buffers(), values.buffers()
        return (
            (self._values.type, len(self._values), self._values.offset, len(mine))
            == (values.type, len(values), values.offset, len(others))
            and len(values) > 0
            and [_place(buffer) for buffer in mine] == [_place(buffer) for buffer in others]
        )


def _parted(array: pa.Array) -> tuple[pa.Array | None, pa.Array]:
    """The index of each row's value, None if each row has its own, and the values."""
    if pa.types.is_dictionary(array.type):
        return array.indices, array.dictionary
    if pa.types.is_run_end_encoded(array.type):
        array.run_ends.validate(full=True)
        rows = np.arange(array.offset, array.offset + len(array))
        return pa.array(np.searchsorted(array.run_ends, rows, side="right")), array.values
    return None, array


def _as_bytes(values: pa.Array) -> pa.Array:
    """Strings as binary values, since Arrow takes one string that is not UTF-8 for damage."""
    if pa.types.is_string(values.type):
        return values.view(pa.binary())
    if pa.types.is_large_string(values.type):
        return values.view(pa.large_binary())
    if pa.types.is_string_view(values.type):
        return values.view(pa.binary_view())
    return values


def _require_within(indices: pa.Array, count: int) -> None:
    bounds = pc.min_max(indices).as_py()
    if bounds["min"] is not None and not 0 <= bounds["min"] <= bounds["max"] < count:
        raise pa.ArrowInvalid(
            f"a row names value {bounds['min']} or {bounds['max']} of a dictionary of {count}"
        )


def _place(buffer: pa.Buffer | None) -> tuple[int, int]:
    return (0, 0) if buffer is None else (buffer.address, buffer.size)


def _decoded(value: bytes | None) -> str | Unusable | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Unusable("not UTF-8", error.reason)
