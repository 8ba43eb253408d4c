"""Mixtures of real data sets: what fits together, and what loaders of any shape read of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_data import made_documents, write_dataset

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.batch import NO_SAMPLE, Batch, SampleId
from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.loader import TrainLoader, ValidationLoader
from mamba_dist.data.manifest import write_manifest
from mamba_dist.data.samples import validation_samples
from mamba_dist.data.training_sources import (
    RunData,
    TrainingSource,
    new_run,
    open_sources,
    source_records,
)
from mamba_dist.errors import DataError

LENGTH, GLOBAL = 16, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets large and small."""
    folder = tmp_path_factory.mktemp("mixed")
    write_dataset(folder / "large", made_documents(120, seed=1), made_documents(40, seed=2))
    write_dataset(folder / "small", made_documents(25, seed=3), made_documents(4, seed=4))
    return folder


def config(folder: Path, workers: int = 0, **limits: int) -> DataConfig:
    sources = [
        {"path": str(folder / name), "weight": weight, "max_epochs": limits.get(name)}
        for name, weight in (("large", 3), ("small", 1))
    ]
    return DataConfig(sources=sources, sequence_length=LENGTH, num_workers=workers, seed=3)


@pytest.fixture(scope="module")
def changed(folder: Path) -> RunData:
    """A run that began with the large data set alone, in half the batch."""
    alone = DataConfig(dataset_path=str(folder / "large"), sequence_length=LENGTH, seed=3)
    began = new_run(open_sources(alone), alone, global_batch_size=GLOBAL // 2).order
    sources = open_sources(config(folder))
    records = source_records(sources, config(folder))
    return RunData(began.changed(step=5, sources=records, global_batch_size=GLOBAL), sources)


def step_rows(ranks: list[list[Batch]]) -> tuple[list[SampleId], torch.Tensor]:
    batches = [batch for rank in ranks for batch in rank]
    rows = torch.cat([torch.stack([b.input_ids, b.labels, b.seq_idx.long()], 1) for b in batches])
    return [sample for batch in batches for sample in batch.sample_ids], rows


@pytest.mark.parametrize(
    ("world_size", "micro", "workers", "first"),
    [(1, 4, 1, 5), (1, 2, 4, 7), (2, 4, 2, 6), (2, 1, 3, 5), (4, 4, 0, 9), (8, 2, 0, 5)],
)
def test_a_changed_mixture_is_read_alike_by_any_world_workers_micro_batch_and_resume(
    folder: Path, changed: RunData, world_size: int, micro: int, workers: int, first: int
) -> None:
    last = first + 3

    def steps(world: int, rank: int, micro: int, workers: int) -> list[list[Batch]]:
        loader = TrainLoader(
            changed,
            config(folder, workers),
            plan=BatchPlan(micro, GLOBAL // micro // world, GLOBAL),
            rank=rank,
            world_size=world,
            start_step=first,
            end_step=last,
        )
        return list(loader)

    expected = [step_rows([step]) for step in steps(1, 0, GLOBAL, 0)]
    ranks = [steps(world_size, rank, micro, workers) for rank in range(world_size)]
    found = [step_rows(list(step)) for step in zip(*ranks, strict=True)]
    assert len(found) == last - first
    streams = [source.dataset.train for source in changed.sources]
    for step, (samples, rows), (same, same_rows) in zip(
        range(first, last), found, expected, strict=True
    ):
        located = [changed.order.locate(position) for position in changed.order.positions(step)]
        assert samples == same == [SampleId(one.source, one.number) for one in located]
        assert torch.equal(rows, same_rows)
        for (source, number), row in zip(samples, rows, strict=True):
            start = number * LENGTH
            assert row[0].tolist() == streams[source].read(start, start + LENGTH)[0].tolist()


def test_sources_are_opened_in_the_order_of_the_mixture_however_they_are_listed(
    folder: Path, changed: RunData
) -> None:
    data = config(folder)
    listed = data.model_copy(update={"sources": data.sources[::-1]})
    paths = [source.dataset.path for source in open_sources(data)]
    assert paths == [source.dataset.path for source in open_sources(listed)]
    assert [str(path) for path in paths] == [s.path for s in changed.order.segments[-1].sources]
    wrong = RunData(changed.order, changed.sources[::-1])
    plan = BatchPlan(4, 4, GLOBAL)
    with pytest.raises(ValueError, match="the open data sets are not those of"):
        TrainLoader(wrong, data, plan=plan, rank=0, world_size=1, start_step=5)


def test_steps_of_an_earlier_segment_are_not_read_again(folder: Path, changed: RunData) -> None:
    with pytest.raises(ValueError, match="from step 4 on does not fit"):
        TrainLoader(
            changed,
            config(folder),
            plan=BatchPlan(4, 4, GLOBAL),
            rank=0,
            world_size=1,
            start_step=4,
        )


def test_a_loader_reads_up_to_samples_that_are_passed_over_and_on_behind_them(
    folder: Path, changed: RunData
) -> None:
    order = changed.order.without(range(8, 10))
    plan = BatchPlan(4, GLOBAL // 4, GLOBAL)
    one = TrainLoader(
        RunData(order, changed.sources),
        config(folder),
        plan=plan,
        rank=0,
        world_size=1,
        start_step=6,
        end_step=10,
    )
    found = [[sample for batch in step for sample in batch.sample_ids] for step in one]
    read = [changed.order.positions(step) for step in (6, 7, 10, 11)]
    located = [[changed.order.locate(position) for position in step] for step in read]
    assert found == [[SampleId(s.source, s.number) for s in step] for step in located]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("most", [8, 10_000])
def test_validation_is_allotted_by_weight_as_far_as_each_source_reaches(
    folder: Path, world_size: int, most: int
) -> None:
    sources = open_sources(config(folder))
    loaders = [
        ValidationLoader(
            sources,
            config(folder),
            micro_batch_size=2,
            max_sequences=most,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    samples = [s for loader in loaders for batch in loader for s in batch.sample_ids]
    kept = [sample for sample in samples if sample != NO_SAMPLE]
    assert len(set(kept)) == len(kept)
    by_name = {
        source.dataset.path.name: sum(1 for sample in kept if sample.source == index)
        for index, source in enumerate(sources)
    }
    available = {
        source.dataset.path.name: len(validation_samples(source.dataset, LENGTH))
        for source in sources
    }
    assert by_name == ({"large": 6, "small": 2} if most == 8 else available)


def test_one_data_set_under_two_names_is_refused(folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(folder / "small")
    both = DataConfig(sources=[{"path": str(folder / "small")}, {"path": str(twin)}])
    with pytest.raises(DataError, match=r"small and \S+twin in data.sources are the same data set"):
        open_sources(both)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("sha256", "1" * 64, "sha256 is "), ("eos_id", 5, "eos_id is "), ("vocab_size", 999, "vocab")],
)
def test_data_sets_of_different_tokenizers_do_not_mix(
    folder: Path, tmp_path: Path, field: str, value: object, said: str
) -> None:
    other = write_dataset(tmp_path / "other", made_documents(9, seed=7), made_documents(5, seed=8))
    tokenizer = replace(other.manifest.tokenizer, **{field: value})
    write_manifest(other.path, replace(other.manifest, tokenizer=tokenizer))
    both = DataConfig(sources=[{"path": str(folder / "small")}, {"path": str(other.path)}])
    with pytest.raises(DataError) as error:
        open_sources(both)
    message = str(error.value)
    assert said in message
    assert str(folder / "small") in message
    assert str(other.path) in message


def test_a_source_with_nothing_to_predict_is_named(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "tiny", [[0]], [[1, 0]])
    sources = [
        TrainingSource(open_dataset(path), 1.0, None)
        for path in (folder / "small", tmp_path / "tiny")
    ]
    with pytest.raises(DataError, match="tiny has 1 train tokens, too few"):
        source_records(sources, config(folder))


def test_the_record_of_a_source_says_what_it_held(folder: Path) -> None:
    dataset: TokenDataset = open_dataset(folder / "small")
    [record] = source_records([TrainingSource(dataset, 2.5, 4)], config(folder))
    assert (record.path, record.weight, record.max_epochs) == (str(folder / "small"), 2.5, 4)
    assert record.samples == (dataset.train.tokens - 1) // LENGTH
    assert record.content.train_tokens == dataset.train.tokens
    assert record.content.val_documents == 4
    assert record.content.shards == len(dataset.manifest.shards)
