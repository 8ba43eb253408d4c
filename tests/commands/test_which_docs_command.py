import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from made_dataset import MadeDataset

from mamba_dist.commands.plan_packing import main as plan_packing
from mamba_dist.commands.which_docs import main
from mamba_dist.data.batch import SampleId, pack
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.lookup import SplitIndex
from mamba_dist.data.manifest import write_manifest
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.samples import training_samples
from mamba_dist.data.tokenization import load_tokenizer


def which(
    capsys: pytest.CaptureFixture[str], made: MadeDataset, *options: object, code: int = 0
) -> str:
    capsys.readouterr()
    assert main([str(made.folder), *map(str, options)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def named(printed: str) -> list[tuple[int, str]]:
    """(doc_id, input file) of each document printed."""
    found = re.findall(r"^doc_id (\d+): \d+ tokens from (\S+), document 1 of its 1$", printed, re.M)
    return [(int(doc_id), name) for doc_id, name in found]


def test_every_document_is_found_by_its_number_with_its_file_and_text(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = set()
    for doc_id, (name, text) in enumerate(made_once.texts.items()):
        printed = which(capsys, made_once, "--doc-id", doc_id, "--tokens", "10000")
        assert named(printed) == [(doc_id, name)]
        assert repr(text) in printed
        splits.add(re.search(r"of (train|val)$", printed, re.M).group(1))  # type: ignore[union-attr]
    assert splits == {"train", "val"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_position_leads_to_the_document_that_stands_there(
    made_once: MadeDataset, split: str
) -> None:
    dataset = open_dataset(made_once.folder)
    stream = getattr(dataset, split)
    index = SplitIndex(made_once.folder, dataset.manifest, split)
    ids, begins = stream.read(0, stream.tokens)
    places = list(index.between(0, stream.tokens))
    assert [place.position for place in places] == begins.nonzero()[0].tolist()
    for number, place in enumerate(places):
        end = place.position + place.tokens
        assert index.read(place, most=10**6).tolist() == ids[place.position : end].tolist()
        assert index.nth(number) == place == index.find(place.doc_id)
        for position in (place.position, end - 1):
            assert list(index.between(position, position + 1)) == [place]
    shards = [shard.tokens for shard in dataset.manifest.shards_of(split)]
    assert all(place.shard_position < max(shards) for place in places)


def test_a_position_is_answered_on_the_command_line(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(made_once.folder)
    place = SplitIndex(made_once.folder, dataset.manifest, "val").nth(3)
    printed = which(capsys, made_once, "--position", place.position, "--split", "val")
    assert named(printed) == [(place.doc_id, list(made_once.texts)[place.doc_id])]
    assert f"{place.shard}, batch {place.batch}, row {place.row}, token " in printed


def test_a_sample_id_names_every_document_of_its_window(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = open_dataset(made_once.folder)
    printed = which(capsys, made_once, "--sample-id", 4, "--sequence-length", 128)
    found = named(printed)
    assert "sample id 4: tokens 512 to 640 of train" in printed
    row = pack(
        [training_samples(dataset, packing="concat", length=128)], [SampleId(0, 4)], pad_token_id=0
    )
    # The label of the last position may belong to one document more.
    assert len(found) - (int(row.seq_idx[0, -1]) + 1) in (0, 1)
    tokenizer = load_tokenizer(made_once.folder / "tokenizer.json")
    shown = tokenizer.decode(row.input_ids[0].tolist())
    texts = list(made_once.texts.values())
    assert shown in "".join(texts[doc_id] for doc_id, _ in found)


def test_the_samples_that_a_training_log_names_lead_to_their_windows(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    data = {"sequence_length": 64, "seed": 11}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    windows = (open_dataset(made_once.folder).train.tokens - 1) // 64
    order = SampleOrder(windows, 11)
    printed = which(capsys, made_once, "--samples", "30-32", "--config", config)
    for sample in (30, 31, 32):
        epoch, window = order.locate(sample)
        assert f"sample {sample} of the run: epoch {epoch}, sample id {window}\n" in printed
        alone = which(capsys, made_once, "--sample-id", window, "--sequence-length", 64)
        assert alone in printed
        for run in (config, tmp_path):
            assert alone == which(capsys, made_once, "--sample-id", window, "--config", run)


def test_a_planned_sample_names_the_document_of_each_of_its_pieces(
    made: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = which(
        capsys, made, "--sample-id", 1, "--sequence-length", 96, "--packing", "best_fit", code=2
    )
    assert "python tools/plan_packing.py" in error
    assert plan_packing([str(made.folder), "--packing", "best_fit", "--sequence-length", "96"]) == 0
    dataset = open_dataset(made.folder)
    samples = training_samples(dataset, packing="best_fit", length=96)
    sample = next(n for n in range(len(samples)) if len(samples.spans(n)) > 2)
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    data = {"sequence_length": 96, "packing": "best_fit", "shuffle": False}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    printed = which(capsys, made, "--samples", sample, "--config", config)
    row = pack([samples], [SampleId(0, sample)], pad_token_id=0)
    texts = list(made.texts.values())
    tokenizer = load_tokenizer(made.folder / "tokenizer.json")
    found = named(printed)
    assert len(found) == len(samples.spans(sample))
    for number, (doc_id, _) in enumerate(found):
        ids = row.input_ids[0][(row.seq_idx[0] == number)]
        assert tokenizer.decode(ids.tolist()) in texts[doc_id]


def test_places_that_do_not_exist_say_which_do(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = open_dataset(made_once.folder).val.tokens
    for options, wanted in (
        (("--doc-id", 150), "holds no document 150; its doc_ids go from 0 to 149"),
        (
            ("--position", tokens, "--split", "val"),
            f"do not lie in the val split, which has {tokens}",
        ),
        (("--sample-id", 10**6, "--sequence-length", 64), "there is no sample id 1000000"),
    ):
        error = which(capsys, made_once, *options, code=2)
        assert error.startswith("error: ")
        assert wanted in error


@pytest.mark.parametrize("options", [("--samples", "3"), ("--sample-id", "3"), ()])
def test_a_question_that_lacks_something_is_refused(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(made_once.folder), *options])
    assert "--config" in capsys.readouterr().err


def test_damage_is_one_clear_error(made: MadeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    shard = open_dataset(made.folder).manifest.shards[0]
    path = made.folder / shard.file
    content = bytearray(path.read_bytes())
    content[shard.batches[0].values_at : shard.batches[0].values_at + 2] = b"\xff\xff"
    path.write_bytes(content)
    error = which(capsys, made, "--position", 0, code=2)
    assert f"shard {path} is damaged: it holds id 65535, outside the vocabulary of 320" in error
    content[shard.batches[0].values_at : shard.batches[0].values_at + 2] = b"\x05\x00"
    at = shard.batches[0].offsets_at
    for damage in (b"\xff" * 8, b"\xff" * 7 + b"\x7f"):
        content[at + 8 : at + 16] = damage
        path.write_bytes(content)
        error = which(capsys, made, "--sample-id", 0, "--sequence-length", 200, code=2)
        assert f"shard {path} is damaged: " in error
        assert "batch 0" in error
    manifest = open_dataset(made.folder).manifest
    first, *others = shard.batches
    misplaced = replace(shard, batches=[replace(first, offsets_at=10**9), *others])
    write_manifest(made.folder, replace(manifest, shards=[misplaced, *manifest.shards[1:]]))
    error = which(capsys, made, "--position", 0, code=2)
    assert f"at byte 1000000000 of shard {path}" in error


def test_a_damaged_list_of_inputs_is_named(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (made.folder / "inputs.jsonl").write_text("{}\n")
    assert "inputs.jsonl cannot be read" in which(capsys, made, "--doc-id", 1, code=2)
