"""The data sets of a run, opened and found to fit together, and their records for checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass

from mamba_dist.config.schema import DataConfig
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.samples import training_samples
from mamba_dist.data.segments import (
    RunOrder,
    SourceContent,
    SourceRecord,
    first_segment,
    mixture_fingerprint,
)
from mamba_dist.errors import DataError


@dataclass(frozen=True)
class TrainingSource:
    """An open data set with its place in the mixture."""

    dataset: TokenDataset
    weight: float
    max_epochs: int | None


@dataclass(frozen=True)
class RunData:
    """The order of a run, and the open sources of its last segment in that segment's order."""

    order: RunOrder
    sources: tuple[TrainingSource, ...]


def open_sources(config: DataConfig) -> tuple[TrainingSource, ...]:
    """The data sets that a config names, by fingerprint.

    Raises:
        DataError: one cannot be opened, two are the same, or two were made by different tokenizers.
    """
    sources = [
        TrainingSource(open_dataset(one.path), one.weight, one.max_epochs)
        for one in config.all_sources
    ]
    seen: dict[str, TokenDataset] = {}
    for dataset in (source.dataset for source in sources):
        if (twin := seen.get(dataset.fingerprint)) is not None:
            raise DataError(
                f"{twin.path} and {dataset.path} in data.sources are the same data set "
                f"(fingerprint {dataset.fingerprint[:12]}); name it once, with the sum of the "
                "weights"
            )
        seen[dataset.fingerprint] = dataset
        _check_same_tokenizer(sources[0].dataset, dataset)
    return tuple(sorted(sources, key=lambda source: source.dataset.fingerprint))


def source_records(
    sources: Sequence[TrainingSource], config: DataConfig
) -> tuple[SourceRecord, ...]:
    """What a checkpoint says of the sources of a run that begins.

    Raises:
        DataError: a training split has nothing to predict, or needs a plan that is not there.
    """
    return tuple(
        _record(
            source,
            samples=len(
                training_samples(
                    source.dataset, packing=config.packing, length=config.sequence_length
                )
            ),
        )
        for source in sources
    )


def sources_fingerprint(sources: Sequence[TrainingSource]) -> str:
    """The fingerprint that a run of these sources has, for which no plan need be there."""
    return mixture_fingerprint([_record(source, samples=0) for source in sources])


def _record(source: TrainingSource, *, samples: int) -> SourceRecord:
    return SourceRecord(
        path=str(source.dataset.path),
        fingerprint=source.dataset.fingerprint,
        weight=source.weight,
        max_epochs=source.max_epochs,
        samples=samples,
        content=_content(source.dataset),
    )


def new_run(
    sources: Sequence[TrainingSource], config: DataConfig, *, global_batch_size: int
) -> RunData:
    """The data of a run that begins.

    Raises:
        DataError: a training split has nothing to predict, or needs a plan that is not there.
    """
    records = source_records(sources, config)
    segment = first_segment(records, global_batch_size=global_batch_size)
    return RunData(
        RunOrder([segment], seed=config.seed, shuffle=config.shuffle),
        tuple(sorted(sources, key=lambda source: source.dataset.fingerprint)),
    )


def _check_same_tokenizer(first: TokenDataset, other: TokenDataset) -> None:
    ours, theirs = first.manifest.tokenizer, other.manifest.tokenizer
    for name in ("sha256", "vocab_size", "eos_id"):
        one, two = getattr(ours, name), getattr(theirs, name)
        if one != two:
            raise DataError(
                f"the data sets of data.sources have different tokenizers: {name} is {one} in "
                f"{first.path}, {two} in {other.path}; tokenize all with one tokenizer"
            )


def _content(dataset: TokenDataset) -> SourceContent:
    manifest = dataset.manifest
    return SourceContent(
        train_tokens=manifest.tokens("train"),
        train_documents=manifest.documents("train"),
        val_tokens=manifest.tokens("val"),
        val_documents=manifest.documents("val"),
        shards=len(manifest.shards),
        tokenizer_sha256=manifest.tokenizer.sha256,
        vocab_size=manifest.tokenizer.vocab_size,
        eos_id=manifest.tokenizer.eos_id,
        train_split=manifest.settings.train_split,
        val_split=manifest.settings.val_split,
    )
