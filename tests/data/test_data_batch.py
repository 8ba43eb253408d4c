from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import EOS, made_documents, write_dataset

from mamba_dist.data.batch import IGNORED_LABEL, NO_SAMPLE, SampleId, count_windows, pack
from mamba_dist.data.dataset import TokenDataset

PAD = 7


def naive(documents: list[list[int]], window: int, length: int) -> tuple[list[int], ...]:
    """Inputs, labels and seq_idx of one window, token by token."""
    stream = [(token, number) for number, doc in enumerate(documents) for token in doc]
    inputs, labels, owners = [], [], []
    for position in range(window * length, (window + 1) * length):
        if position >= len(stream):
            inputs.append(PAD)
            labels.append(IGNORED_LABEL)
            owners.append(-1)
            continue
        token, owner = stream[position]
        inputs.append(token)
        owners.append(owner)
        follows = position + 1 < len(stream) and stream[position + 1][1] == owner
        labels.append(stream[position + 1][0] if follows else IGNORED_LABEL)
    numbering = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    return inputs, labels, [numbering[owner] for owner in owners]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=30),
    length=st.integers(1, 40),
    batch_tokens=st.sampled_from([10, 33, 1000]),
)
def test_rows_equal_the_naive_construction(
    lengths: list[int], length: int, batch_tokens: int
) -> None:
    documents = [[1 + i] * n + [EOS] for i, n in enumerate(lengths)]
    with TemporaryDirectory() as folder:
        dataset = write_dataset(
            Path(folder), documents, [[1, EOS]], shard_bytes=80, batch_tokens=batch_tokens
        )
        windows = list(range(count_windows(dataset.train.tokens, length, pad_tail=True)))
        samples = [SampleId(0, window) for window in windows]
        rows = pack([dataset.train], samples, length=length, pad_token_id=PAD)
    assert rows.sample_ids == tuple(samples)
    for window in windows:
        inputs, labels, owners = naive(documents, window, length)
        assert rows.input_ids[window].tolist() == inputs
        assert rows.labels[window].tolist() == labels
        assert rows.seq_idx[window].tolist() == owners


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(
        tmp_path, made_documents(40, seed=1), made_documents(10, seed=2), batch_tokens=64
    )


def test_types_are_those_of_the_model(dataset: TokenDataset) -> None:
    rows = pack([dataset.train], [SampleId(0, 0), SampleId(0, 3)], length=16, pad_token_id=PAD)
    assert (rows.input_ids.dtype, rows.labels.dtype) == (np.int64, np.int64)
    assert rows.seq_idx.dtype == np.int32
    assert rows.input_ids.shape == rows.labels.shape == rows.seq_idx.shape == (2, 16)


def test_a_row_without_a_sample_is_all_padding(dataset: TokenDataset) -> None:
    rows = pack([dataset.train], [NO_SAMPLE], length=16, pad_token_id=PAD)
    assert (rows.input_ids == PAD).all()
    assert (rows.labels == IGNORED_LABEL).all()


def test_every_label_of_the_stream_comes_once_over_all_windows(dataset: TokenDataset) -> None:
    stream = dataset.val
    windows = range(count_windows(stream.tokens, 16, pad_tail=True))
    rows = pack([stream], [SampleId(0, window) for window in windows], length=16, pad_token_id=PAD)
    documents = dataset.manifest.documents("val")
    assert int((rows.labels != IGNORED_LABEL).sum()) == stream.tokens - documents


@pytest.mark.parametrize(
    ("tokens", "train", "val"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 1), (8, 1, 1), (9, 1, 1), (10, 1, 2), (17, 2, 2), (18, 2, 3)],
)
def test_training_drops_the_tail_and_validation_pads_it(tokens: int, train: int, val: int) -> None:
    assert count_windows(tokens, 8, pad_tail=False) == train
    assert count_windows(tokens, 8, pad_tail=True) == val


def test_rows_of_several_sources_come_from_their_own_stream(dataset: TokenDataset) -> None:
    streams = [dataset.train, dataset.val]
    mixed = [SampleId(1, 2), SampleId(0, 2), NO_SAMPLE, SampleId(1, 0)]
    rows = pack(streams, mixed, length=16, pad_token_id=PAD)
    assert rows.sample_ids == tuple(mixed)
    for row, (source, number) in enumerate(mixed):
        if source >= 0:
            stream = streams[source]
            assert (
                rows.input_ids[row].tolist()
                == stream.read(number * 16, number * 16 + 16)[0].tolist()
            )
