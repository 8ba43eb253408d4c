"""A packing plan: one file beside the shards that says which tokens each training sequence holds.

    DATASET/train-best_fit-2048.plan      named by split, mode and sequence length

    page 0     "mamba-dist packing plan", the xxh3 of the next line, and that line: PlanHeader as
               JSON; spaces up to 4096 bytes
    spans      {start: uint64, length: uint32}, the spans of sample 0, of sample 1, and so on
    ends       uint64, for each sample the number of spans up to its last
    hashes     uint64, the xxh3 of each 4096-byte page of the two tables, which are padded to pages

Little endian. A sample is read by the pages that hold it, each compared with its hash: opening
costs one page, reading three or four, whatever the size. Where the numbers come from: planning.py.
"""

import json
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from mamba_dist.data.durable import new_file
from mamba_dist.errors import DataError

PLAN_FORMAT_VERSION = 1
"""Raised when the file's layout changes, or what planning.py answers for the same data set."""
PLAN_PATTERN = "train-*.plan"
_MAGIC = "mamba-dist packing plan"
_PAGE_BYTES = 4096
_PAGES_AT_ONCE = 256
_SPAN = np.dtype([("start", "<u8"), ("length", "<u4")])
_END = np.dtype("<u8")
_HASH = np.dtype("<u8")


@dataclass(frozen=True)
class PlanKey:
    """What a plan is a pure function of; `fingerprint` is the data set's."""

    fingerprint: str
    split: str
    packing: str
    sequence_length: int


@dataclass(frozen=True)
class PlanTotals:
    """What the samples of an epoch come to. `labels` counts the positions that predict something,
    in a plan all but the padding; `cut_documents` those of `documents` that lie in more than one
    sample.
    """

    samples: int
    spans: int
    labels: int
    documents: int
    cut_documents: int

    def unlabelled_share(self, sequence_length: int) -> float:
        """The part of all positions that predict nothing, 0 to 1."""
        return 1 - self.labels / max(1, self.samples * sequence_length)

    @property
    def cut_share(self) -> float:
        """The part of the documents that is cut, 0 to 1."""
        return self.cut_documents / max(1, self.documents)


@dataclass(frozen=True)
class PlanHeader:
    """The first page of a plan."""

    format_version: int
    key: PlanKey
    totals: PlanTotals


@dataclass(frozen=True)
class Span:
    """Positions of a sample that read on in the split: `length` inputs from token `start` on, the
    label of each being the token after it."""

    start: int
    length: int


def plan_key(fingerprint: str, packing: str, sequence_length: int) -> PlanKey:
    """What the plan of a data set's training split is known by; no other split has one."""
    return PlanKey(fingerprint, "train", packing, sequence_length)


def plan_path(folder: Path, key: PlanKey) -> Path:
    """The file of a plan in its data set's folder."""
    return folder / f"{key.split}-{key.packing}-{key.sequence_length}.plan"


class PlanWriter:
    """Takes the samples of a plan group by group; holds none of them in memory."""

    def __init__(self, stream: BinaryIO, ends: BinaryIO) -> None:
        self._stream, self._ends = stream, ends
        self._spans = 0
        stream.write(b" " * _PAGE_BYTES)

    def add(
        self,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
    ) -> None:
        """Appends samples by their spans, (spans,); `counts` (samples,) of these in each."""
        table = np.empty(len(starts), dtype=_SPAN)
        table["start"], table["length"] = starts, lengths
        self._stream.write(table.tobytes())
        self._ends.write((self._spans + np.cumsum(counts)).astype(_END).tobytes())
        self._spans += len(starts)

    def finish(self, key: PlanKey, totals: PlanTotals) -> None:
        """Writes what stands before and after the spans."""
        _fill_page(self._stream)
        self._ends.seek(0)
        while block := self._ends.read(_PAGE_BYTES * _PAGES_AT_ONCE):
            self._stream.write(block)
        _fill_page(self._stream)
        self._append_hashes(self._stream.tell())
        text = json.dumps(asdict(PlanHeader(PLAN_FORMAT_VERSION, key, totals)))
        head = f"{_MAGIC}\n{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}\n".encode()
        assert len(head) <= _PAGE_BYTES
        self._stream.seek(0)
        self._stream.write(head)

    def _append_hashes(self, end: int) -> None:
        for at in range(_PAGE_BYTES, end, _PAGE_BYTES * _PAGES_AT_ONCE):
            self._stream.seek(at)
            block = self._stream.read(min(_PAGE_BYTES * _PAGES_AT_ONCE, end - at))
            pages = [block[i : i + _PAGE_BYTES] for i in range(0, len(block), _PAGE_BYTES)]
            self._stream.seek(0, 2)
            self._stream.write(np.array([_page_hash(page) for page in pages], _HASH).tobytes())


@contextmanager
def new_plan(path: Path) -> Iterator[PlanWriter]:
    """A writer of the plan at `path`, which appears whole when the block ends without error.

    Raises:
        DataError: another process is making it, or it cannot be written.
    """
    try:
        with new_file(path) as stream, tempfile.TemporaryFile(dir=path.parent) as ends:
            yield PlanWriter(stream, ends)
    except OSError as error:
        raise DataError(
            f"cannot make {path}: {error.filename or path}: {error.strerror or error}; mend that "
            "and plan again"
        ) from error


class PackingPlan:
    """An open plan, as its whole file mapped; a page is read when a sample wants it."""

    def __init__(self, path: Path, header: PlanHeader, mapped: mmap.mmap) -> None:
        self.path = path
        self._map = mapped
        self.key = header.key
        self.totals = header.totals
        self._layout = _Layout(header.totals)

    def __len__(self) -> int:
        return self.totals.samples

    def spans(self, sample: int) -> list[Span]:
        """The spans of a sample, in the order of their places in the split.

        Raises:
            DataError: the file is damaged there.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        before = max(sample - 1, 0)
        ends = self._table(self._layout.ends_at, _END, before, sample + 1)
        begin, end = int(ends[0]) if sample else 0, int(ends[-1])
        table = self._table(self._layout.spans_at, _SPAN, begin, end)
        starts, lengths = table["start"].tolist(), table["length"].tolist()
        return [Span(*pair) for pair in zip(starts, lengths, strict=True)]

    def _table(self, at: int, dtype: np.dtype[Any], begin: int, end: int) -> npt.NDArray[Any]:
        """Rows of a table, every page that they touch compared with its hash."""
        first, last = at + begin * dtype.itemsize, at + end * dtype.itemsize
        for page in range(first // _PAGE_BYTES, -(-last // _PAGE_BYTES)):
            self._check_page(page)
        return np.frombuffer(self._map, dtype=dtype, count=end - begin, offset=first)

    def _check_page(self, page: int) -> None:
        body = self._map[page * _PAGE_BYTES : (page + 1) * _PAGE_BYTES]
        at = self._layout.hashes_at + (page - 1) * _HASH.itemsize
        stored = int(np.frombuffer(self._map, _HASH, count=1, offset=at)[0])
        if _page_hash(body) != stored:
            raise DataError(
                f"packing plan {self.path} is damaged between bytes {page * _PAGE_BYTES} and "
                f"{(page + 1) * _PAGE_BYTES - 1}; {advice(self.path.parent, self.key)}"
            )


def open_plan(folder: Path, key: PlanKey) -> PackingPlan:
    """The plan of a data set's folder; only its first page is read.

    Raises:
        DataError: it is missing, cut short, damaged, of another data set or of another version.
    """
    path = plan_path(folder, key)
    how = advice(folder, key)
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(
            f"data.packing {key.packing} needs the plan {path}, which does not exist; {how}"
        ) from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise DataError(f"cannot read {path}: {error}; {how}") from error
    mapped.madvise(mmap.MADV_RANDOM)
    header = _parse_header(mapped[:_PAGE_BYTES], path, how=how)
    if header.key != key:
        other = next(
            f.name for f in fields(PlanKey) if getattr(header.key, f.name) != getattr(key, f.name)
        )
        raise DataError(
            f"{path} is the plan of another data set: its {other} is {getattr(header.key, other)}, "
            f"this one's {getattr(key, other)}; {how}"
        )
    expected = _Layout(header.totals).end
    if (size := len(mapped)) != expected:
        what = "cut short" if size < expected else "too long"
        raise DataError(f"packing plan {path} is {what}: {size} bytes, not {expected}; {how}")
    return PackingPlan(path, header, mapped)


def advice(folder: Path, key: PlanKey) -> str:
    """What to do to have the plan."""
    return (
        f"make it by `python tools/plan_packing.py {folder} --packing {key.packing} "
        f"--sequence-length {key.sequence_length}`"
    )


class _Layout:
    """Where the parts of a plan begin, in bytes; all but the last are whole pages."""

    def __init__(self, totals: PlanTotals) -> None:
        self.spans_at = _PAGE_BYTES
        self.ends_at = self.spans_at + _pages(totals.spans * _SPAN.itemsize)
        self.hashes_at = self.ends_at + _pages(totals.samples * _END.itemsize)
        self.end = self.hashes_at + (self.hashes_at // _PAGE_BYTES - 1) * _HASH.itemsize


def _pages(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def _fill_page(stream: BinaryIO) -> None:
    at = stream.tell()
    stream.write(bytes(_pages(at) - at))


def _page_hash(page: bytes) -> int:
    return xxhash.xxh3_64_intdigest(page)


def _parse_header(head: bytes, path: Path, *, how: str) -> PlanHeader:
    damaged = f"packing plan {path} is damaged: its first page is not a plan's; {how}"
    magic, _, rest = head.decode("utf-8", errors="replace").partition("\n")
    digest, _, rest = rest.partition("\n")
    text = rest.partition("\n")[0]
    if magic != _MAGIC or xxhash.xxh3_64_hexdigest(text.encode()) != digest:
        raise DataError(damaged)
    content = json.loads(text)
    if (version := content.get("format_version")) != PLAN_FORMAT_VERSION:
        raise DataError(
            f"{path} has plan version {version}, this program reads {PLAN_FORMAT_VERSION}; use the "
            f"program that made it to go on with a run, or {how}"
        )
    return PlanHeader(version, PlanKey(**content["key"]), PlanTotals(**content["totals"]))
