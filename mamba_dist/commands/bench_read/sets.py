"""The data sets that are read: random ids in documents of random lengths, or almost nothing but
holes, so that a trillion tokens fit on any disk.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from mamba_dist.commands.bench_read.spec import WINDOW_TOKENS
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import (
    BuildSettings,
    InputSummary,
    Manifest,
    TokenizerIdentity,
    write_manifest,
)
from mamba_dist.data.shard import schema_metadata
from mamba_dist.data.shard_index import ShardRecord, shard_name
from mamba_dist.data.shard_writer import Documents, ShardWriter

_VOCAB_SIZE: Final = 50_277
_DTYPE: Final = "uint16"
_ID_BYTES: Final = 2
# As tokenize.py makes them.
_SHARD_BYTES: Final = 512 << 20
_BATCH_TOKENS: Final = 8 << 20
_VAL_TOKENS: Final = 10_000
# exp(6 + 1.2² / 2): 830 tokens in the mean, most much shorter, some very long.
_LOG_MEAN: Final = 6.0
_LOG_DEVIATION: Final = 1.2
_DOCUMENTS_AT_ONCE: Final = 2_000
_WINDOWS_AT_ONCE: Final = 512
_COMPARED: Final = 128

Ids = npt.NDArray[np.uint16]


def make_set(folder: Path, tokens: int) -> None:
    """A data set of at least so many training tokens."""
    rng = np.random.default_rng(0)
    shards = [
        *_written(folder, "train", _random_documents(rng, tokens)),
        *_written(folder, "val", _random_documents(rng, _VAL_TOKENS)),
    ]
    _finish(folder, shards)


def make_sparse_set(folder: Path, tokens: int) -> None:
    """As many whole shards as hold at least so many training tokens; each of their batches is one
    document of zeros that begins with four ids by which the places can be told apart, and only
    what is not zero is written.
    """
    batches = _SHARD_BYTES // _ID_BYTES // _BATCH_TOKENS
    whole = [
        Documents(
            np.zeros(_BATCH_TOKENS, np.uint16),
            np.array([_BATCH_TOKENS]),
            np.zeros(1, np.uint64),
        )
    ] * batches
    [template] = _written(folder, "train", iter(whole))
    path = folder / template.file
    gaps = _unlike_zero(path, template)
    path.unlink()
    shards = []
    for number in range(-(-tokens // template.tokens)):
        record = dataclasses.replace(template, file=shard_name("train", number))
        _write_with_holes(folder / record.file, record, gaps, number=number)
        shards.append(record)
    shards += _written(folder, "val", _random_documents(np.random.default_rng(0), _VAL_TOKENS))
    _finish(folder, shards)


def write_sparse_file(source: Path, path: Path) -> None:
    """The training tokens of a sparse set as one flat file, with the same holes."""
    manifest = open_dataset(source).manifest
    position = 0
    with path.open("wb") as stream:
        for number, record in enumerate(manifest.shards_of("train")):
            for index, batch in enumerate(record.batches):
                stream.seek(_ID_BYTES * position)
                stream.write(_marker(number, index))
                position += batch.tokens
        stream.truncate(_ID_BYTES * position)


class SetTokens:
    """The windows of the training split of a data set of ours."""

    def __init__(self, source: Path) -> None:
        dataset = open_dataset(source)
        self._manifest = dataset.manifest
        self._stream = dataset.train
        self.tokens = self._stream.tokens
        self.windows = self.tokens // WINDOW_TOKENS

    def blocks(self) -> Iterator[Ids]:
        """(windows, 2049) ids of some windows at a time."""
        for ids, _ in self._read():
            yield ids.astype(np.uint16).reshape(-1, WINDOW_TOKENS)

    def document_lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document; the last ends with the windows."""
        begins = np.concatenate([begins for _, begins in self._read()])
        return np.diff(np.flatnonzero(begins), append=len(begins)).astype(np.int32)

    def compared(self) -> tuple[int, ...]:
        """Windows to compare: such as hold the beginning of a batch, and any others."""
        begins = self._manifest.shards_of("train").token_begins
        at_batches = np.array(begins)[:-1] // WINDOW_TOKENS
        spread = at_batches[np.linspace(0, len(at_batches) - 1, _COMPARED).astype(np.int64)]
        others = np.random.default_rng(1).integers(0, self.windows, _COMPARED)
        return tuple(sorted({min(int(n), self.windows - 1) for n in (*spread, *others)}))

    def _read(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        end = self.windows * WINDOW_TOKENS
        step = _WINDOWS_AT_ONCE * WINDOW_TOKENS
        for start in range(0, end, step):
            yield self._stream.read(start, min(end, start + step))


def _random_documents(rng: np.random.Generator, tokens: int) -> Iterator[Documents]:
    written = documents = 0
    while written < tokens:
        drawn = rng.lognormal(_LOG_MEAN, _LOG_DEVIATION, _DOCUMENTS_AT_ONCE).astype(np.int64) + 2
        lengths = drawn[: int(np.searchsorted(np.cumsum(drawn), tokens - written)) + 1]
        ids = rng.integers(1, _VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
        ids[np.cumsum(lengths) - 1] = 0
        numbers = np.arange(documents, documents + len(lengths), dtype=np.uint64)
        yield Documents(ids, lengths, numbers)
        written += len(ids)
        documents += len(lengths)


def _written(folder: Path, split: str, documents: Iterator[Documents]) -> list[ShardRecord]:
    metadata = schema_metadata(
        split, dtype=_DTYPE, tokenizer_sha256="0" * 64, vocab_size=_VOCAB_SIZE, eos_id=0
    )
    writer = ShardWriter(
        folder, split, metadata=metadata, shard_bytes=_SHARD_BYTES, batch_tokens=_BATCH_TOKENS
    )
    for each in documents:
        writer.add(each)
    return writer.finish()


def _unlike_zero(path: Path, record: ShardRecord) -> list[tuple[int, bytes]]:
    """What stands around the ids of the batches, and where."""
    found, at = [], 0
    with path.open("rb") as stream:
        for values_at, tokens in [(b.values_at, b.tokens) for b in record.batches] + [
            (record.bytes, 0)
        ]:
            stream.seek(at)
            found.append((at, stream.read(values_at - at)))
            at = values_at + _ID_BYTES * tokens
    return found


def _write_with_holes(
    path: Path, record: ShardRecord, gaps: list[tuple[int, bytes]], *, number: int
) -> None:
    with path.open("wb") as stream:
        stream.truncate(record.bytes)
        for at, content in gaps:
            stream.seek(at)
            stream.write(content)
        for index, batch in enumerate(record.batches):
            stream.seek(batch.values_at)
            stream.write(_marker(number, index))


def _marker(shard: int, batch: int) -> bytes:
    return np.array([shard % 50_000, batch + 1, shard // 50_000, 7], dtype=np.uint16).tobytes()


def _finish(folder: Path, shards: list[ShardRecord]) -> None:
    manifest = Manifest(
        tool_version="bench",
        dtype=_DTYPE,
        tokenizer=TokenizerIdentity("none", "none", "0" * 64, _VOCAB_SIZE, "<eos>", 0, ()),
        settings=BuildSettings(
            "0" * 64, None, "text", 0.9, 0.1, shard_bytes=_SHARD_BYTES, batch_tokens=_BATCH_TOKENS
        ),
        inputs=InputSummary(0, 0, sum(s.documents for s in shards), 0, 0, "0" * 64),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
