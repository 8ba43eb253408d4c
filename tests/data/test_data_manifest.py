import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_data import made_documents, write_dataset
from old_manifest import write_version_1

from mamba_dist.data.dataset import TokenDataset, open_dataset
from mamba_dist.data.manifest import check_splits, check_vocabulary, read_manifest
from mamba_dist.errors import DataError


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(tmp_path, made_documents(30, seed=1), made_documents(9, seed=2))


def edit(dataset: TokenDataset, change: Callable[[dict[str, Any]], object]) -> None:
    path = dataset.path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_is_read_as_it_was_written(dataset: TokenDataset) -> None:
    assert read_manifest(dataset.path) == dataset.manifest


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no manifest.json.*data_prep/tokenize.py"):
        open_dataset(tmp_path)


def test_a_torn_manifest_is_one_clear_error(dataset: TokenDataset) -> None:
    path = dataset.path / "manifest.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        open_dataset(dataset.path)


def test_a_newer_format_is_refused_by_its_version(dataset: TokenDataset) -> None:
    edit(dataset, lambda content: content.update(format_version=3))
    with pytest.raises(DataError, match="format version 3, this program reads up to 2"):
        open_dataset(dataset.path)


def test_a_missing_field_is_named(dataset: TokenDataset) -> None:
    edit(dataset, lambda content: content["tokenizer"].pop("eos_id"))
    with pytest.raises(DataError, match=r"is damaged .*eos_id"):
        open_dataset(dataset.path)


def test_a_changed_field_is_noticed_by_the_fingerprint(dataset: TokenDataset) -> None:
    edit(dataset, lambda content: content["settings"].update(train_split=0.5))
    with pytest.raises(DataError, match="was changed by hand"):
        open_dataset(dataset.path)


def test_a_shard_outside_the_folder_is_refused(dataset: TokenDataset) -> None:
    write_version_1(
        dataset.path,
        dataset.manifest,
        change=lambda content: content["shards"][0].update(file="../other.arrow"),
    )
    with pytest.raises(DataError, match="is damaged"):
        open_dataset(dataset.path)


@pytest.mark.parametrize("number", [-8, 2**64])
@pytest.mark.parametrize("place", ["shard", "batch"])
def test_a_number_of_version_1_that_no_file_has_is_refused(
    dataset: TokenDataset, number: int, place: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        if place == "shard":
            content["shards"][0]["bytes"] = number
        else:
            content["shards"][0]["batches"][0][3] = number

    write_version_1(dataset.path, dataset.manifest, change=change)
    with pytest.raises(
        DataError, match=r"manifest\.json is damaged .*a number of train-00000\.arrow is"
    ):
        open_dataset(dataset.path)


@pytest.mark.parametrize(
    ("field", "wrong"),
    # documents, tokens, and where offsets, values and doc_ids begin
    [(0, 1), (1, -1), (2, 8), (2, 1), (3, 64), (3, -2), (4, 8)],
)
def test_a_batch_that_version_1_places_elsewhere_is_never_read(
    dataset: TokenDataset, field: int, wrong: int
) -> None:
    def change(content: dict[str, Any]) -> None:
        one, other = content["shards"][0]["batches"][:2]
        one[field] += wrong
        if field < 2:  # the sum is compared when the file is opened
            other[field] -= wrong

    write_version_1(dataset.path, dataset.manifest, change=change)
    with pytest.raises(
        DataError, match=r"manifest\.json places batch 0 of shard .*train-00000\.arrow where it"
    ):
        open_dataset(dataset.path).train.read(0, 5)


def test_damage_to_what_a_shard_says_of_its_batches_is_named_beside_version_1(
    dataset: TokenDataset,
) -> None:
    shard = dataset.manifest.shards[0]
    before, message_of = shard.batches[:2]
    write_version_1(dataset.path, dataset.manifest)
    path, expected = dataset.path / shard.file, dataset.train.read(0, shard.tokens)[0].tolist()
    whole, named = path.read_bytes(), 0
    for at in range(before.doc_ids_at + 8 * before.documents, message_of.offsets_at):
        content = bytearray(whole)
        content[at] ^= 0x80
        path.write_bytes(content)
        try:
            found = open_dataset(dataset.path).train.read(0, shard.tokens)[0].tolist()
        except DataError as error:
            named += str(path) in str(error)
        else:
            assert found == expected
    assert named > 50


@pytest.mark.parametrize("column", [0, 1], ids=["tokens", "documents"])
def test_an_index_that_ends_elsewhere_is_refused_before_samples_are_counted(
    dataset: TokenDataset, column: int
) -> None:
    path = dataset.path / "index.npy"
    numbers = np.load(path)
    train = dataset.manifest.shards_of("train")
    numbers[9 * (len(train) + 1) + (column + 1) * (train.batches + 1) - 1] += 100
    np.save(path, numbers)
    with pytest.raises(DataError, match=r"index\.npy has \d+ train (tokens|documents), not"):
        open_dataset(dataset.path)


def test_the_fingerprint_follows_tokens_tokenizer_and_splits(dataset: TokenDataset) -> None:
    manifest = dataset.manifest
    first, second, *rest = manifest.shards
    exchanged = [replace(second, file=first.file), replace(first, file=second.file)]
    others = [
        replace(manifest, shards=(replace(first, sha256="1" * 64), second, *rest)),
        replace(manifest, shards=(*exchanged, *rest)),
        replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="1" * 64)),
        replace(manifest, settings=replace(manifest.settings, train_split=0.8)),
    ]
    fingerprints = {manifest.fingerprint, *(other.fingerprint for other in others)}
    assert len(fingerprints) == 5
    assert replace(manifest, tool_version="9").fingerprint == manifest.fingerprint


def test_training_with_other_splits_is_refused(dataset: TokenDataset) -> None:
    check_splits(dataset.manifest, train_split=0.9, val_split=0.1 + 1e-9)
    with pytest.raises(DataError, match=r"split 0.9/0.1 .* asks for 0.8/0.2"):
        check_splits(dataset.manifest, train_split=0.8, val_split=0.2)


def test_a_model_with_too_few_embeddings_is_refused(dataset: TokenDataset) -> None:
    check_vocabulary(dataset.manifest, 1000)
    with pytest.raises(DataError, match=r"has 1000 ids, model\.vocab_size is 999"):
        check_vocabulary(dataset.manifest, 999)
