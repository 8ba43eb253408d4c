import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from made_data import alone, made_documents, run_of, write_dataset

from mamba_dist.config.batch import BatchPlan
from mamba_dist.config.schema import DataConfig, Packing
from mamba_dist.data.batch import IGNORED_LABEL, NO_SAMPLE, Batch, SampleId
from mamba_dist.data.dataset import TokenDataset
from mamba_dist.data.loader import TrainLoader, ValidationLoader
from mamba_dist.data.planning import make_plan
from mamba_dist.data.samples import training_samples, validation_samples
from mamba_dist.errors import DataError

LENGTH = 16
GLOBAL = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """About 100 training samples in each packing mode: an epoch ends within a step."""
    made = write_dataset(
        tmp_path_factory.mktemp("dataset"),
        made_documents(80, seed=1),
        made_documents(20, seed=2),
    )
    for mode in ("best_fit", "pad"):
        make_plan(
            made.path, made.manifest, packing=mode, length=LENGTH, advance=lambda tokens: None
        )
    return made


def data_config(workers: int = 0, **fields: object) -> DataConfig:
    return DataConfig(sequence_length=LENGTH, num_workers=workers, seed=3, **fields)


def loader(
    dataset: TokenDataset,
    *,
    world_size: int = 1,
    rank: int = 0,
    micro: int = 4,
    workers: int = 0,
    start_step: int = 0,
    end_step: int | None = None,
    packing: Packing = "concat",
) -> TrainLoader:
    config = data_config(workers, packing=packing)
    return TrainLoader(
        run_of(dataset, config, global_batch_size=GLOBAL),
        config,
        plan=BatchPlan(micro, GLOBAL // micro // world_size, GLOBAL),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        end_step=end_step,
    )


def together(steps: list[list[Batch]]) -> tuple[torch.Tensor, tuple[SampleId, ...]]:
    """All rows of the batches of one step, and their samples."""
    batches = [batch for rank in steps for batch in rank]
    rows = torch.cat([torch.stack([b.input_ids, b.labels, b.seq_idx.long()], 1) for b in batches])
    return rows, tuple(sample for batch in batches for sample in batch.sample_ids)


@pytest.mark.parametrize(
    ("world_size", "micro", "workers", "packing"),
    [
        (1, 1, 0, "concat"),
        (2, 4, 0, "concat"),
        (4, 2, 0, "concat"),
        (8, 2, 0, "concat"),
        (8, 1, 0, "concat"),
        (1, 4, 1, "concat"),
        (2, 2, 2, "concat"),
        (1, 16, 3, "concat"),
        (8, 2, 0, "best_fit"),
        (2, 4, 1, "best_fit"),
        (4, 2, 0, "pad"),
        (1, 16, 2, "pad"),
    ],
)
def test_a_step_has_the_same_samples_for_any_world_workers_and_micro_batch(
    dataset: TokenDataset, world_size: int, micro: int, workers: int, packing: Packing
) -> None:
    steps = 8  # beyond the first epoch of concat and best_fit
    expected = [together([step]) for step in loader(dataset, end_step=steps, packing=packing)]
    ranks = [
        list(
            loader(
                dataset,
                world_size=world_size,
                rank=rank,
                micro=micro,
                workers=workers,
                end_step=steps,
                packing=packing,
            )
        )
        for rank in range(world_size)
    ]
    found = [together(list(step)) for step in zip(*ranks, strict=True)]
    assert len(found) == steps
    for (rows, samples), (expected_rows, expected_samples) in zip(found, expected, strict=True):
        assert samples == expected_samples
        assert torch.equal(rows, expected_rows)


def test_a_step_is_a_list_of_micro_batches_of_this_rank(dataset: TokenDataset) -> None:
    step = next(iter(loader(dataset, world_size=2, micro=4)))
    assert len(step) == 2
    for batch in step:
        assert batch.input_ids.shape == batch.labels.shape == batch.seq_idx.shape == (4, LENGTH)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.seq_idx.dtype == torch.int32
        assert len(batch.sample_ids) == 4


@pytest.mark.parametrize(
    ("start_step", "workers", "packing"),
    [
        *((step, workers, "concat") for step in (1, 5, 13) for workers in (0, 2)),
        (5, 0, "best_fit"),
        (13, 0, "best_fit"),
        (5, 1, "best_fit"),
        (13, 0, "pad"),
    ],
)
def test_a_run_resumed_at_any_step_reads_what_it_would_have_read(
    dataset: TokenDataset, start_step: int, workers: int, packing: Packing
) -> None:
    whole = list(islice(loader(dataset, packing=packing), start_step, start_step + 3))
    resumed = islice(loader(dataset, start_step=start_step, workers=workers, packing=packing), 3)
    for expected, found in zip(whole, resumed, strict=True):
        assert torch.equal(together([expected])[0], together([found])[0])


@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_every_sample_comes_once_in_an_epoch_and_the_next_one_differs(
    dataset: TokenDataset, packing: Packing
) -> None:
    count = len(training_samples(dataset, packing=packing, length=LENGTH))
    steps = islice(loader(dataset, packing=packing), 2 * -(-count // GLOBAL))
    samples = [sample.number for step in steps for batch in step for sample in batch.sample_ids]
    first, second = samples[:count], samples[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second


def test_the_samples_of_a_step_can_be_named_without_reading(dataset: TokenDataset) -> None:
    one = loader(dataset, world_size=2, rank=1, micro=2)
    for number, step in enumerate(islice(one, 4)):
        assert one.sample_ids(number) == tuple(s for b in step for s in b.sample_ids)


def test_a_loader_that_is_closed_leaves_no_process(dataset: TokenDataset) -> None:
    steps = iter(loader(dataset, workers=2))
    next(steps)
    running = multiprocessing.active_children()
    assert len(running) == 2
    steps.close()
    assert not [one for one in running if one.is_alive()]


def test_shuffle_can_be_turned_off(dataset: TokenDataset) -> None:
    config = data_config(shuffle=False)
    data = run_of(dataset, config, global_batch_size=4)
    plain = TrainLoader(data, config, plan=BatchPlan(4, 1, 4), rank=0, world_size=1)
    numbers = [[sample.number for sample in b.sample_ids] for [b] in islice(plain, 2)]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_plan_of_another_world_is_a_programming_error(dataset: TokenDataset) -> None:
    data = run_of(dataset, data_config(), global_batch_size=8)
    with pytest.raises(ValueError, match="does not fit 3 ranks"):
        TrainLoader(data, data_config(), plan=BatchPlan(2, 2, 8), rank=0, world_size=3)
    with pytest.raises(ValueError, match="does not fit Segment"):
        TrainLoader(data, data_config(), plan=BatchPlan(2, 2, 4), rank=0, world_size=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_while_reading_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    dataset = write_dataset(tmp_path, made_documents(80, seed=1), made_documents(9, seed=2))
    shard = tmp_path / dataset.manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    at = dataset.manifest.shards[0].batches[0].values_at
    content[at : at + 2] = b"\xff\xff"
    shard.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(loader(dataset, workers=workers, end_step=8))
    assert str(caught.value).startswith(f"shard {shard} holds id 65535, outside the vocabulary")
    assert "\n" not in str(caught.value)


def test_a_data_set_replaced_under_the_loader_is_refused(tmp_path: Path) -> None:
    old = write_dataset(tmp_path, made_documents(80, seed=1), made_documents(9, seed=2))
    write_dataset(tmp_path, made_documents(80, seed=4), made_documents(9, seed=2))
    with pytest.raises(DataError, match="was replaced while it was read"):
        next(iter(loader(old, workers=1)))


def test_a_killed_loader_process_ends_the_run_with_a_clear_error(dataset: TokenDataset) -> None:
    steps = iter(loader(dataset, workers=2))
    next(steps)
    victim, other = multiprocessing.active_children()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a loader process died \(killed by SIGKILL"):
        # What the victim had put into its pipe before, hundreds of tiny batches, still comes out.
        list(islice(steps, 5000))
    assert not other.is_alive()


def test_signals_to_the_group_leave_the_loader_at_work(dataset: TokenDataset) -> None:
    # The trainer wants to finish its step and write a checkpoint before it ends.
    steps = iter(loader(dataset, workers=2))
    next(steps)
    next(steps)
    for process in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            assert process.pid is not None
            os.kill(process.pid, number)
    assert len(list(islice(steps, 10))) == 10


TRAINER = """
import sys
from dataclasses import replace
from mamba_dist.config.schema import DataConfig
from mamba_dist.data.prefetch import MicrostepPlan, PrefetchJob, read_ahead
from mamba_dist.data.training_sources import new_run, open_sources
if __name__ == "__main__":
    config = DataConfig(dataset_path=sys.argv[1], sequence_length=16)
    data = new_run(open_sources(config), config, global_batch_size=2)
    dataset = data.sources[0].dataset
    plan = MicrostepPlan(data.order, 2, 1, 0)
    job = PrefetchJob(
        (dataset.path,), (dataset.fingerprint,), plan, "concat", 16, 0, first=0, stride=2, end=None
    )
    rows = read_ahead([job, replace(job, first=1)])
    next(rows)
    print("reading, torch:", "torch" in sys.modules, flush=True)
    sys.stdin.read()
    sys.keep_alive = rows
"""


def test_loader_processes_end_when_the_trainer_is_killed(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(dataset.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"reading, torch: False\n"
    session = trainer.pid
    assert len(session_members(session)) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session_members(session)


def test_a_trainer_that_ends_with_its_loader_open_does_not_hang(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    done = subprocess.run(
        [sys.executable, str(script), str(dataset.path)], input=b"", capture_output=True, timeout=30
    )
    assert done.returncode == 0
    assert done.stderr == b""


def session_members(session: int) -> list[str]:
    """Command lines of the living loader processes of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            command = (process / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if int(fields[3]) == session and "spawn_main" in command:
            found.append(command)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_sequences", [1, 7, 10_000])
def test_validation_gives_every_rank_as_many_batches_and_every_sample_once(
    dataset: TokenDataset, world_size: int, max_sequences: int
) -> None:
    ranks = [
        ValidationLoader(
            alone(dataset),
            data_config(),
            micro_batch_size=2,
            max_sequences=max_sequences,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    batches = [list(rank) for rank in ranks]
    assert {len(found) for found in batches} == {len(ranks[0])}
    samples = [s for step in zip(*batches, strict=True) for b in step for s in b.sample_ids]
    kept = [sample for sample in samples if sample != NO_SAMPLE]
    expected = min(max_sequences, len(validation_samples(dataset, LENGTH)))
    assert len(kept) == len(set(kept)) == expected
    for batch in (b for found in batches for b in found):
        for row, sample in enumerate(batch.sample_ids):
            if sample == NO_SAMPLE:
                assert (batch.labels[row] == IGNORED_LABEL).all()


def test_validation_is_the_same_whatever_the_packing_of_training(dataset: TokenDataset) -> None:
    concat, best_fit = (
        ValidationLoader(
            alone(dataset),
            data_config(packing=packing),
            micro_batch_size=3,
            max_sequences=9,
            rank=0,
            world_size=1,
        )
        for packing in ("concat", "best_fit")
    )
    for one, other in zip(concat, best_fit, strict=True):
        assert torch.equal(together([[one]])[0], together([[other]])[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_damaged_under_the_loader_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    dataset = write_dataset(tmp_path, made_documents(80, seed=1), made_documents(9, seed=2))
    make_plan(tmp_path, dataset.manifest, packing="pad", length=16, advance=lambda tokens: None)
    path = tmp_path / "train-pad-16.plan"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(loader(dataset, workers=workers, end_step=20, packing="pad"))
    assert str(caught.value).startswith(f"packing plan {path} is damaged between bytes 4096 and")


def test_validation_on_all_windows_sees_every_label_of_the_split(dataset: TokenDataset) -> None:
    everything = ValidationLoader(
        alone(dataset), data_config(), micro_batch_size=3, max_sequences=10**6, rank=0, world_size=1
    )
    labels = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in everything)
    assert labels == dataset.val.tokens - dataset.manifest.documents("val")
    again = [batch.sample_ids for batch in everything]
    assert again == [batch.sample_ids for batch in everything]


def test_a_split_with_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    small = write_dataset(tmp_path, [[0]], [[0]])
    with pytest.raises(DataError, match="1 train tokens, too few to predict any"):
        loader(small)
    with pytest.raises(DataError, match="1 val tokens, too few"):
        ValidationLoader(
            alone(small), data_config(), micro_batch_size=1, max_sequences=1, rank=0, world_size=1
        )


def test_a_corpus_shorter_than_one_window_is_padded_rather_than_lost(tmp_path: Path) -> None:
    small = write_dataset(tmp_path, [[5, 6, 0]], [[5, 6, 0]])
    [[batch]] = list(
        TrainLoader(
            run_of(small, data_config(), global_batch_size=1),
            data_config(),
            plan=BatchPlan(1, 1, 1),
            rank=0,
            world_size=1,
            end_step=1,
            pad_token_id=9,
        )
    )
    assert batch.input_ids[0, :4].tolist() == [5, 6, 0, 9]
    assert batch.labels[0, :4].tolist() == [6, 0, IGNORED_LABEL, IGNORED_LABEL]
    assert batch.seq_idx[0, :4].tolist() == [0, 0, 0, 1]
