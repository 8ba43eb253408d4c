import gzip
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from made_data import SilentListener, build, folder_bytes, made_texts
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.durable import quick_hash
from mamba_dist.data.preparation.crew import Attempt, Station, Trace
from mamba_dist.data.preparation.documents import Reading
from mamba_dist.data.preparation.fast_backends import REFERENCE
from mamba_dist.data.preparation.parts import PartSettings, make_part, tokenize_units
from mamba_dist.data.preparation.sources import DiscoveryOptions, cut_units, discover
from mamba_dist.data.tokenization import FlatIds, load_tokenizer
from mamba_dist.data.workers import WorkerFailure
from mamba_dist.errors import DataError


def documents(folder: Path, split: str) -> dict[int, list[int]]:
    """The ids of every document of a split, by its number in the corpus, through plain pyarrow."""
    found: dict[int, list[int]] = {}
    for shard in open_dataset(folder).manifest.shards_of(split):
        with pa.ipc.open_file(str(folder / shard.file)) as reader:
            table = reader.read_all()
        found.update(zip(table["doc_id"].to_pylist(), table["tokens"].to_pylist(), strict=True))
    return found


def test_every_document_is_there_once_with_its_end_token(
    finished: Path, corpus_path: Path, tokenizer_path: Path
) -> None:
    train, val = documents(finished, "train"), documents(finished, "val")
    assert not set(train) & set(val)
    everything = {**train, **val}
    tokenizer = load_tokenizer(tokenizer_path)
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus_path.rglob("*.txt"))]
    expected = tokenizer.encode_batch(texts)
    assert sorted(everything) == list(range(len(texts)))
    for number, ids in enumerate(expected):
        assert everything[number] == [*ids.tolist(), tokenizer.eos_id]
    assert 2 <= len(val) <= 25
    assert list(train) == sorted(train)


def test_a_data_set_folder_holds_nothing_but_its_files(finished: Path) -> None:
    manifest = open_dataset(finished).manifest
    shards = {shard.file for shard in manifest.shards}
    lists = {"manifest.json", "index.npy", "inputs.jsonl", "bad_documents.jsonl", "tokenizer.json"}
    assert {path.name for path in finished.iterdir()} == shards | lists
    assert len(shards) >= 3


def test_the_inputs_are_listed_with_their_first_document(finished: Path, corpus_path: Path) -> None:
    lines = [json.loads(line) for line in (finished / "inputs.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines][:2] == ["corpus/a/00.txt", "corpus/a/02.txt"]
    assert [line["first_doc_id"] for line in lines] == list(range(60))


@pytest.mark.parametrize("options", [{"workers": 3}, {"workers": 2, "batch_documents": 3}])
def test_the_bytes_do_not_depend_on_workers_or_grouping(
    finished: Path,
    corpus_path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    options: dict[str, int],
) -> None:
    build(corpus_path, tmp_path, tokenizer_path, **options)
    assert folder_bytes(tmp_path) == folder_bytes(finished)


def test_the_shards_do_not_depend_on_the_units(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    build(corpus_path, tmp_path, tokenizer_path, unit_bytes=1)
    assert folder_bytes(tmp_path) == folder_bytes(finished)


def test_equal_documents_fall_into_the_same_split(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = made_texts(40)
    for copy in range(3):
        for number, text in enumerate(texts):
            (corpus / f"{copy}-{number:02}.txt").write_text(text, encoding="utf-8")
    build(corpus, tmp_path / "set", tokenizer_path)
    sides = [set(map(tuple, documents(tmp_path / "set", s).values())) for s in ("train", "val")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40


def test_a_corpus_too_small_for_both_splits_names_the_counts(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the only document")
    with pytest.raises(DataError, match=r"has 1 documents: \d for training and \d for validation"):
        build(tmp_path / "a.txt", tmp_path / "set", tokenizer_path)
    assert list((tmp_path / "set").iterdir()) == []


def write_jsonl(path: Path, texts: list[str]) -> bytes:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(content)
    return content


def test_every_input_format_gives_the_same_tokens(tokenizer_path: Path, tmp_path: Path) -> None:
    texts = made_texts(50, seed=4)
    content = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"):
        output = tmp_path / f"set-{name}"
        build(tmp_path / name, output, tokenizer_path)
        found.append((documents(output, "train"), documents(output, "val")))
    assert found.count(found[0]) == 5
    assert sum(map(len, found[0])) == 50


def test_bad_documents_are_listed_and_the_others_are_kept(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    texts = made_texts(40)
    content = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text"\n' + content + b'{"body": "x"}\n')
    result = build(tmp_path / "a.jsonl", tmp_path / "set", tokenizer_path, max_bad=2)
    assert result.manifest.inputs.bad_documents == 3
    listed = (tmp_path / "set" / "bad_documents.jsonl").read_text().splitlines()
    assert [(json.loads(line)["line"], json.loads(line)["fault"]) for line in listed] == [
        (1, "empty"),
        (2, "broken JSON"),
        (43, "no text field"),
    ]
    numbers = documents(tmp_path / "set", "train") | documents(tmp_path / "set", "val")
    assert sorted(numbers) == list(range(40))


def test_too_many_bad_documents_stop_the_build_and_name_file_and_line(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", made_texts(40))
    (tmp_path / "a.jsonl").write_bytes(content + b"{broken\n" * 4)
    output = tmp_path / "set"
    with pytest.raises(DataError) as caught:
        build(tmp_path / "a.jsonl", output, tokenizer_path, max_bad=3)
    assert "4 bad documents, more than --max-bad 3" in str(caught.value)
    assert "a.jsonl:41: broken JSON" in str(caught.value)
    assert not (output / "manifest.json").exists()
    assert not list(output.glob("*.arrow"))
    build(tmp_path / "a.jsonl", output, tokenizer_path, max_bad=4)


def test_a_corpus_of_empty_files_is_one_clear_error(tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):
        (corpus / f"{number}.py").write_text("\n")
    with pytest.raises(DataError, match=r"no usable document in 3 files \(3 empty\)"):
        build(corpus, tmp_path / "set", tokenizer_path)


def test_a_wrong_text_field_is_one_clear_error(tokenizer_path: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", made_texts(20))
    with pytest.raises(DataError, match=r"20 no text field\); the first: .*fields: text"):
        build(tmp_path / "a.jsonl", tmp_path / "set", tokenizer_path, text_field="body")


def test_a_damaged_input_stops_the_build_with_its_name(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", made_texts(20))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(DataError, match=r"b.jsonl.gz is cut short"):
        build([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], tmp_path / "set", tokenizer_path)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_missing_tokenizer_leaves_nothing_behind(corpus_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build(corpus_path, tmp_path / "set", tmp_path / "none.json")
    assert not (tmp_path / "set").exists()


def test_a_tokenizer_is_trained_on_the_corpus_when_none_is_given(
    corpus_path: Path, tmp_path: Path
) -> None:
    listener = SilentListener()
    result = build(corpus_path, tmp_path / "one", None, listener=listener)
    assert listener.notices == ["training a byte-level BPE tokenizer of 300 ids"]
    assert result.manifest.tokenizer.vocab_size == 300
    assert load_tokenizer(tmp_path / "one" / "tokenizer.json").vocab_size == 300
    build(corpus_path, tmp_path / "two", None, workers=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert build(corpus_path, tmp_path / "one", None).was_complete


def test_large_vocabularies_are_stored_in_four_bytes(corpus_path: Path, tmp_path: Path) -> None:
    words = WordLevel({"?": 0, "the": 65_535, "text": 65_536, "<eos>": 70_000}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "wide.json"))
    build(corpus_path, tmp_path / "set", tmp_path / "wide.json")
    dataset = open_dataset(tmp_path / "set")
    assert dataset.manifest.dtype == "uint32"
    ids, begins = dataset.train.read(0, dataset.train.tokens)
    assert set(ids.tolist()) == {0, 65_535, 65_536, 70_000}
    assert (ids[np.flatnonzero(begins)[1:] - 1] == 70_000).all()


def write_cuttable(path: Path, rows: list[str | None]) -> None:
    """A file that units can share, over several row groups or record batches."""
    table = pa.table({"text": rows})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["b.jsonl", "b.parquet", "b.arrow"])
def test_a_file_that_several_units_share_gives_what_one_unit_gives(
    tokenizer_path: Path, tmp_path: Path, name: str
) -> None:
    texts: list[str | None] = [*made_texts(150, seed=6)]
    for bad in (3, 70, 71, 149):
        texts[bad] = None
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(made_texts(10, seed=7)):
        (corpus / f"{'ac'[number % 2]}{number}.txt").write_text(text, encoding="utf-8")
    write_cuttable(corpus / name, texts)
    listener = SilentListener()
    build(corpus, tmp_path / "cut", tokenizer_path, workers=3, listener=listener)
    assert listener.units >= 4
    whole = SilentListener()
    build(corpus, tmp_path / "whole", tokenizer_path, unit_bytes=1 << 20, listener=whole)
    assert whole.units == 1
    assert folder_bytes(tmp_path / "cut") == folder_bytes(tmp_path / "whole")
    listed = (tmp_path / "cut" / "bad_documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [4, 71, 72, 150]
    inputs = [
        json.loads(line) for line in (tmp_path / "cut" / "inputs.jsonl").read_text().splitlines()
    ]
    assert [line["documents"] for line in inputs] == [1] * 5 + [146] + [1] * 5
    assert inputs[5]["xxh3"] == quick_hash(corpus / name)
    with pytest.raises(DataError, match=rf"(?s)corpus/{name}:71: no text field"):
        build(corpus, tmp_path / "strict", tokenizer_path, max_bad=1)
    assert build(corpus, tmp_path / "cut", tokenizer_path).was_complete


class Rewriter(SilentListener):
    """Writes to a file once the build has begun, its size as it was."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        self._path.write_bytes(self._path.read_bytes().replace(b"state", b"STATE"))
        os.utime(self._path, ns=(1, 1))


def test_an_input_that_changes_during_the_build_is_named(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, made_texts(40))
    with pytest.raises(DataError, match=r"a.jsonl changed while it was read"):
        build(path, tmp_path / "set", tokenizer_path, listener=Rewriter(path))
    assert not (tmp_path / "set" / "manifest.json").exists()


class Remover(Rewriter):
    """Removes a file once the build has begun to read it."""

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        self._path.unlink()


def test_an_input_that_vanishes_is_named_and_no_disk_is_called_full(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, made_texts(40))
    with pytest.raises(DataError, match=r"^cannot read .*a.jsonl: No such file"):
        build(path, tmp_path / "set", tokenizer_path, listener=Remover(path))


def part_settings(folder: Path) -> PartSettings:
    return PartSettings(
        folder=str(folder),
        tokenizer="",
        eos_token="",
        eos_id=0,
        vocab_size=350,
        dtype="uint16",
        reading=Reading("text", id_field="id"),
        train_split=0.5,
        batch_documents=10,
        backend=REFERENCE,
        max_bad=0,
    )


class Vanishing:
    """Encodes, and the file is gone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        self._path.unlink(missing_ok=True)
        return np.full(len(texts), 5, dtype=np.uint32), np.ones(len(texts), dtype=np.int64)


def test_an_input_that_vanishes_while_it_is_read_is_no_full_disk(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", made_texts(40))
    files = discover([tmp_path], DiscoveryOptions()).files
    [unit] = cut_units(files, unit_bytes=1 << 20)
    with pytest.raises(DataError, match=r"^cannot read .*a.jsonl: No such file .*--exclude it"):
        make_part(unit, part_settings(tmp_path), encoder=Vanishing(tmp_path / "a.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_says_what_the_system_refused_and_lives_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", made_texts(4))
    [unit] = cut_units(discover([tmp_path], DiscoveryOptions()).files, unit_bytes=1 << 20)
    (tmp_path / "file").touch()
    ours, theirs = Pipe()
    trace = Trace()
    settings = replace(part_settings(tmp_path / "file"), tokenizer="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba_dist.data.preparation.parts.load_encoder", lambda *_, **__: Beyond())
        ours.send(Attempt(unit))
        ours.send(Attempt(unit))
        worker = threading.Thread(target=tokenize_units, args=(theirs, Station(settings, trace)))
        worker.start()
        answers = [ours.recv(), ours.recv()]
        ours.close()
        worker.join()
    for answer in answers:
        assert isinstance(answer, WorkerFailure)
        assert "file" in answer.message
        assert "Not a directory" in answer.message


class Beyond:
    """Gives one id a text, which the vocabulary does not have."""

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        return np.full(len(texts), 350, dtype=np.uint32), np.ones(len(texts), dtype=np.int64)


def test_an_id_outside_the_vocabulary_names_the_input_and_leaves_no_part(
    corpus_path: Path, tmp_path: Path
) -> None:
    files = discover([corpus_path], DiscoveryOptions()).files
    [unit] = cut_units(files, unit_bytes=1 << 20)
    between = r"id 350, outside its vocabulary of 350, between corpus/a/00.txt and corpus/b/59.txt"
    with pytest.raises(DataError, match=between):
        make_part(unit, part_settings(tmp_path), encoder=Beyond())
    assert list(tmp_path.iterdir()) == []
