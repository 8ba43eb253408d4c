"""Small corpora and data sets that the tests of this folder share."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_dist.config.schema import DataConfig
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.manifest import (
    BuildSettings,
    InputSummary,
    Manifest,
    Probe,
    TokenizerIdentity,
    write_manifest,
)
from mamba_dist.data.preparation.build import BuildRequest, BuildResult, build_dataset
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.sources import DiscoveryOptions, Unit, discover
from mamba_dist.data.shard import schema_metadata
from mamba_dist.data.shard_writer import Documents, ShardWriter
from mamba_dist.data.training_sources import RunData, TrainingSource, new_run

VOCAB_SIZE = 1000
EOS = 0
_WORDS = "state space model scans the long text, forgets nothing: café 東京 def return".split()  # noqa: SIM905


def made_texts(count: int, *, seed: int = 0) -> list[str]:
    """Texts of 5 to 80 words, all different."""
    rng = random.Random(seed)
    return [
        f"{seed}-{number} " + " ".join(rng.choices(_WORDS, k=rng.randint(5, 80))) + "\n"
        for number in range(count)
    ]


def made_documents(count: int, *, seed: int, longest: int = 40) -> list[list[int]]:
    """Documents of token ids, each with its EOS."""
    rng = random.Random(seed)
    return [
        [*(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, longest))), EOS]
        for _ in range(count)
    ]


class SilentListener:
    """Hears everything, keeps notices and the number of units."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.units = 0
        self.done_bytes = 0

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        self.done_bytes = done_bytes

    def advanced(self, unit: Unit, record: PartRecord) -> None:
        self.units += 1

    def notice(self, text: str) -> None:
        self.notices.append(text)


def make_request(
    roots: Path | Sequence[Path],
    output: Path,
    tokenizer: Path | None,
    *,
    exclude: tuple[str, ...] = (),
    **options: Any,
) -> BuildRequest:
    """A request for a data set, with small units, so that there are several."""
    roots = [roots] if isinstance(roots, Path) else list(roots)
    return BuildRequest(
        output=output,
        corpus=discover(roots, DiscoveryOptions(exclude=exclude, skip=(output,))),
        tokenizer=tokenizer,
        **{
            "train_vocab_size": None if tokenizer else 300,
            "unit_bytes": 4000,
            "shard_bytes": 4000,
            "batch_tokens": 500,
            "train_split": 0.8,
            "val_split": 0.2,
            **options,
        },
    )


def build(
    roots: Path | Sequence[Path],
    output: Path,
    tokenizer: Path | None,
    *,
    listener: SilentListener | None = None,
    **options: Any,
) -> BuildResult:
    """Tokenises a corpus."""
    request = make_request(roots, output, tokenizer, **options)
    return build_dataset(request, listener or SilentListener())


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def as_documents(documents: Iterable[list[int]], *, first: int = 0) -> Documents:
    """Lists of ids as a writer takes them."""
    listed = list(documents)
    return Documents(
        ids=np.array([token for document in listed for token in document], dtype=np.uint16),
        lengths=np.array([len(document) for document in listed], dtype=np.int64),
        doc_ids=np.arange(first, first + len(listed), dtype=np.uint64),
    )


def write_dataset(
    folder: Path,
    train: list[list[int]],
    val: list[list[int]],
    *,
    shard_bytes: int = 600,
    batch_tokens: int = 100,
) -> TokenDataset:
    """A data set of given tokens, over several shards and batches, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = TokenizerIdentity(
        "tokenizers", "tokenizer.json", "0" * 64, VOCAB_SIZE, "<eos>", EOS, (Probe("a", (1,)),)
    )
    shards = []
    for split, documents in (("train", train), ("val", val)):
        writer = ShardWriter(
            folder,
            split,
            metadata=schema_metadata(
                split,
                dtype="uint16",
                tokenizer_sha256=identity.sha256,
                vocab_size=VOCAB_SIZE,
                eos_id=EOS,
            ),
            shard_bytes=shard_bytes,
            batch_tokens=batch_tokens,
        )
        writer.add(as_documents(documents))
        shards += writer.finish()
    manifest = Manifest(
        tool_version="test",
        dtype="uint16",
        tokenizer=identity,
        settings=BuildSettings("0" * 64, None, "text", 0.9, 0.1, shard_bytes, batch_tokens),
        inputs=InputSummary(1, 1, len(train) + len(val), 0, 1, "0" * 64),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
    return open_dataset(folder)


def alone(dataset: TokenDataset) -> tuple[TrainingSource, ...]:
    """The sources of a run that reads one data set."""
    return (TrainingSource(dataset, 1.0, None),)


def run_of(dataset: TokenDataset, config: DataConfig, *, global_batch_size: int) -> RunData:
    """A new run over one data set."""
    return new_run(alone(dataset), config, global_batch_size=global_batch_size)
