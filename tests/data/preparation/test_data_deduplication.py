import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_data import SilentListener, build, folder_bytes, made_texts, make_request

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import DuplicateSummary, read_manifest
from mamba_dist.data.preparation.build import build_share
from mamba_dist.data.preparation.deduplication import first_occurrences, hash_text
from mamba_dist.data.preparation.share import parse_share
from mamba_dist.data.tokenization import load_tokenizer
from mamba_dist.data.verification import dataset_problems
from mamba_dist.errors import DataError

# Few values, so that halves are shared by different hashes, and some in every bucket.
_halves = st.integers(0, 15).map(lambda n: n << 60) | st.integers(0, 2) | st.just(2**64 - 1)


@given(st.lists(st.tuples(_halves, _halves), max_size=40))
def test_the_first_of_equal_hashes_is_told_even_where_half_a_hash_is_shared(
    hashes: list[tuple[int, int]],
) -> None:
    upper = np.array([pair[0] for pair in hashes], dtype=np.uint64)
    lower = np.array([pair[1] for pair in hashes], dtype=np.uint64)
    expected = [pair not in hashes[:place] for place, pair in enumerate(hashes)]
    assert first_occurrences(upper, lower).tolist() == expected


def test_both_halves_of_a_hash_depend_on_the_text() -> None:
    halves = [hash_text(f"text {number}".encode()) for number in range(1000)]
    for side in range(2):
        assert len({pair[side] for pair in halves}) == 1000
        assert max(pair[side] for pair in halves) < 2**64


TEXTS = made_texts(60, seed=2)


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in which most texts stand several times, in the same file and in others."""
    folder = tmp_path_factory.mktemp("repeated") / "corpus"
    folder.mkdir()
    rng = random.Random(1)
    chosen = [*TEXTS, *rng.choices(TEXTS, k=120)]
    rng.shuffle(chosen)
    for number in range(9):
        lines = [json.dumps({"text": text}) for text in chosen[number::9]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def texts_in_order(corpus: Path) -> list[str]:
    lines = [line for path in sorted(corpus.iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["text"] for line in lines]


def documents(folder: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for shard in open_dataset(folder).manifest.shards:
        with pa.ipc.open_file(str(folder / shard.file)) as reader:
            table = reader.read_all()
        found.update(zip(table["doc_id"].to_pylist(), table["tokens"].to_pylist(), strict=True))
    return found


@pytest.fixture(scope="module")
def unique(repeated: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unique") / "set"
    build(repeated, output, tokenizer_path, deduplicate=True)
    return output


def test_the_first_document_of_each_text_stays_under_its_number_in_the_corpus(
    repeated: Path, unique: Path, tokenizer_path: Path
) -> None:
    texts = texts_in_order(repeated)
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode_batch(list(first))
    expected = {
        number: [*one.tolist(), tokenizer.eos_id]
        for number, one in zip(first.values(), ids, strict=True)
    }
    assert documents(unique) == expected


def test_what_was_left_out_is_counted_and_the_data_set_is_sound(
    repeated: Path, unique: Path
) -> None:
    texts = texts_in_order(repeated)
    manifest = read_manifest(unique)
    all_bytes = sum(len(text.encode()) for text in texts)
    kept_bytes = sum(len(text.encode()) for text in TEXTS)
    assert manifest.settings.deduplicate
    assert manifest.duplicates == DuplicateSummary(120, all_bytes - kept_bytes)
    assert (manifest.inputs.documents, manifest.inputs.text_bytes) == (180, all_bytes)
    found = dataset_problems(unique, manifest, depth="sha256", advance=lambda _: None)
    assert list(found) == []


@pytest.mark.parametrize(
    "options", [{"workers": 2}, {"unit_bytes": 300}, {"unit_bytes": 10**9}, {"batch_documents": 3}]
)
def test_duplicates_are_the_same_for_any_workers_and_units(
    repeated: Path, unique: Path, tokenizer_path: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    build(repeated, tmp_path / "set", tokenizer_path, deduplicate=True, **options)
    assert folder_bytes(tmp_path / "set") == folder_bytes(unique)


def test_duplicates_are_the_same_for_tasks(
    repeated: Path, unique: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    request = make_request(repeated, tmp_path / "set", tokenizer_path, deduplicate=True)
    for share in ("1/2", "0/2"):
        build_share(request, parse_share(share), SilentListener())
    build(repeated, tmp_path / "set", tokenizer_path, deduplicate=True, merge_only=True)
    assert folder_bytes(tmp_path / "set") == folder_bytes(unique)


def test_a_build_without_it_is_what_it_was_before_there_was_such_a_setting(
    repeated: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    build(repeated, output, tokenizer_path)
    content = json.loads((output / "manifest.json").read_text())
    assert "deduplicate" not in content["settings"]
    assert "duplicates" not in content
    assert read_manifest(output).documents("train") + read_manifest(output).documents("val") == 180
    assert build(repeated, output, tokenizer_path).was_complete
    with pytest.raises(DataError, match="deduplicate was False, is True"):
        build(repeated, output, tokenizer_path, deduplicate=True)


def test_an_unfinished_build_with_and_without_it_do_not_mix(
    repeated: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    request = make_request(repeated, tmp_path / "set", tokenizer_path)
    build_share(request, parse_share("0/2"), SilentListener())
    plan = json.loads(next((tmp_path / "set").glob(".partial-*/plan.json")).read_text())
    assert "deduplicate" not in plan["settings"]
    other = dataclasses.replace(request, deduplicate=True)
    with pytest.raises(DataError, match="deduplicate was False, is True"):
        build_share(other, parse_share("1/2"), SilentListener())


def test_a_corpus_of_one_text_again_and_again_is_too_small(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "again"}\n' * 50)
    with pytest.raises(DataError, match="has 1 documents of different texts"):
        build(tmp_path / "a.jsonl", tmp_path / "set", tokenizer_path, deduplicate=True)
