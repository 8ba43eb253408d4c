"""The data sets of a run, opened and found to fit together, and their records for checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass

from mamba_dist.config.schema import DataConfig
from mamba_dist.data.batch import count_windows
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
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
    sources: Sequence[TrainingSource], *, sequence_length: int
) -> tuple[SourceRecord, ...]:
    """What a checkpoint says of the sources of a run that begins.

    Raises:
        DataError: a training split has nothing to predict.
    """
    return tuple(
        SourceRecord(
            path=str(source.dataset.path),
            fingerprint=source.dataset.fingerprint,
            weight=source.weight,
            max_epochs=source.max_epochs,
            samples=training_windows(source.dataset, sequence_length),
            content=_content(source.dataset),
        )
        for source in sources
    )


def new_run(
    sources: Sequence[TrainingSource], config: DataConfig, *, global_batch_size: int
) -> RunData:
    """The data of a run that begins.

    Raises:
        DataError: a training split has nothing to predict.
    """
    records = source_records(sources, sequence_length=config.sequence_length)
    segment = first_segment(records, global_batch_size=global_batch_size)
    return RunData(
        RunOrder([segment], seed=config.seed, shuffle=config.shuffle),
        tuple(sorted(sources, key=lambda source: source.dataset.fingerprint)),
    )


def training_windows(dataset: TokenDataset, sequence_length: int) -> int:
    """Samples in one epoch of the training split.

    Raises:
        DataError: there is none.
    """
    return _windows(dataset, "train", sequence_length)


def validation_windows(dataset: TokenDataset, sequence_length: int) -> int:
    """Samples in the validation split.

    Raises:
        DataError: there is none.
    """
    return _windows(dataset, "val", sequence_length)


def _windows(dataset: TokenDataset, split: str, length: int) -> int:
    tokens = dataset.manifest.tokens(split)
    windows = count_windows(tokens, length, pad_tail=split == "val")
    if windows == 0:
        raise DataError(
            f"{dataset.path} has {tokens} {split} tokens, too few to predict any; tokenize a "
            "larger corpus"
        )
    return windows


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
