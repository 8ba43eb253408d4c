"""Every field of a version 1 config has its effect in the running system, see v1_road.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import clean_environment
from v1_road import DOCUMENTS, V1, Made, Step, changed, take_steps, walk_the_road

from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.config import ConfigLoader
from mamba_dist.config.migrate import FIELDS_1
from mamba_dist.data.dataset import open_dataset
from mamba_dist.errors import DataError
from mamba_dist.train.build import open_matching_sources


@pytest.fixture(scope="module")
def made(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return walk_the_road(tiny_data, tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def steps(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    return take_steps(made, tmp_path_factory.mktemp("v1-steps"))


def test_no_field_of_version_1_has_its_default_in_the_file_that_is_run() -> None:
    assert {one.path for one in FIELDS_1} == {f"{s}.{name}" for s in V1 for name in V1[s]}
    same = [o.path for o in FIELDS_1 if V1[o.path.split(".")[0]][o.path.split(".")[1]] == o.default]
    assert not same


@pytest.mark.parametrize(
    ("field", "parameter", "shape"),
    [
        ("d_model", "backbone.norm_f.weight", [24]),
        ("d_state", "backbone.layers.0.mixer.A_log", [72, 8]),
        ("d_conv", "backbone.layers.0.mixer.conv1d.weight", [72, 1, 3]),
        ("expand", "backbone.layers.0.mixer.out_proj.weight", [24, 72]),
        # Rows are padded to a multiple of 8.
        ("vocab_size", "backbone.embedding.weight", [304, 24]),
    ],
)
def test_the_trained_model_has_the_shape_of_the_old_file(
    made: Made, field: str, parameter: str, shape: list[int]
) -> None:
    assert made.manifest.shapes[parameter] == shape, field


def test_n_layers_is_the_number_of_blocks(made: Made) -> None:
    layers = {name.split(".")[2] for name in made.manifest.shapes if ".layers." in name}
    assert layers == {"0", "1"}


def test_pad_token_id_stands_at_padded_positions(steps: dict[str, Step]) -> None:
    assert steps["base"].seen["padded_ids"] == [7]
    assert steps["pad_token_id"].seen["padded_ids"] == [11]


def test_batch_size_is_the_rows_of_a_micro_batch(steps: dict[str, Step]) -> None:
    assert steps["base"].seen["shapes"] == [[2, 96]]
    assert steps["batch_size"].seen["shapes"] == [[5, 96]]
    assert steps["batch_size"].seen["microbatches"] == 3


def test_gradient_accumulation_steps_is_the_micro_batches_of_a_step(
    steps: dict[str, Step],
) -> None:
    assert steps["base"].seen["microbatches"] == 3
    assert steps["gradient_accumulation_steps"].seen["microbatches"] == 2
    assert steps["gradient_accumulation_steps"].seen["shapes"] == [[2, 96]]


def test_max_seq_length_is_the_tokens_of_a_row(steps: dict[str, Step]) -> None:
    assert steps["max_seq_length"].seen["shapes"] == [[2, 32]]


@pytest.mark.parametrize(("case", "rate"), [("base", 2e-3), ("learning_rate", 8e-3)])
def test_learning_rate_is_the_size_of_the_first_step(
    steps: dict[str, Step], case: str, rate: float
) -> None:
    # AdamW's first update of a weight without decay is the rate times the gradient's sign.
    moved = steps[case].moved("backbone.norm_f.weight").abs()
    assert float(moved.median()) == pytest.approx(rate, rel=1e-2)
    assert steps[case].seen["record"]["learning_rate"] == pytest.approx(rate)


def test_weight_decay_shrinks_matrices_and_spares_the_state_space(steps: dict[str, Step]) -> None:
    base, more = steps["base"], steps["weight_decay"]
    name = "backbone.layers.0.mixer.in_proj.weight"
    shrunk = base.after[name] - more.after[name]
    assert torch.allclose(shrunk, 2e-3 * 0.5 * base.before[name], rtol=1e-2, atol=1e-7)
    for spared in ("A_log", "D", "dt_proj.bias"):
        spared = f"backbone.layers.0.mixer.{spared}"
        assert torch.equal(base.after[spared], more.after[spared])


def test_max_grad_norm_is_the_norm_that_reaches_the_optimizer(steps: dict[str, Step]) -> None:
    clipped, free = steps["base"].seen, steps["max_grad_norm"].seen
    assert clipped["record"]["grad_norm"] > 0.25
    assert clipped["clipped_norm"] == pytest.approx(0.25, rel=1e-3)
    assert free["clipped_norm"] == pytest.approx(free["record"]["grad_norm"], rel=1e-3)


def test_use_mixed_precision_computes_products_in_bf16_and_keeps_weights_in_fp32(
    steps: dict[str, Step],
) -> None:
    plain, mixed = steps["base"].seen, steps["use_mixed_precision"].seen
    assert plain["product_dtypes"] == ["torch.float32"]
    assert mixed["product_dtypes"] == ["torch.bfloat16"]
    assert plain["parameter_dtypes"] == mixed["parameter_dtypes"] == ["torch.float32"]
    assert mixed["record"]["loss"] == pytest.approx(plain["record"]["loss"], rel=1e-2)


def test_gradient_checkpointing_keeps_fewer_activations_for_the_same_step(
    steps: dict[str, Step],
) -> None:
    plain, full = steps["base"], steps["gradient_checkpointing"]
    assert full.seen["saved_bytes"] < 0.5 * plain.seen["saved_bytes"]
    assert all(torch.equal(plain.after[name], full.after[name]) for name in plain.after)


def test_shuffle_data_decides_between_file_order_and_a_random_one(steps: dict[str, Step]) -> None:
    assert steps["base"].seen["sample_ids"] == [0, 1, 2, 3, 4, 5]
    shuffled = steps["shuffle_data"].seen["sample_ids"]
    assert len(set(shuffled)) == 6
    assert sorted(shuffled) != [0, 1, 2, 3, 4, 5]


def test_num_workers_is_the_number_of_loader_processes(made: Made) -> None:
    assert made.loader_processes == 2


def test_num_epochs_is_the_number_of_passes_over_the_training_split(made: Made) -> None:
    assert made.manifest.progress.step == made.steps
    assert made.manifest.progress.next_sample == made.steps * 6


def test_warmup_steps_is_the_rise_of_the_learning_rate(made: Made) -> None:
    rates = [record["learning_rate"] for record in made.records if "loss" in record]
    assert rates[:5] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert rates[5] < 2e-3


def test_save_steps_is_the_distance_of_checkpoints(made: Made) -> None:
    expected = [*range(9, made.steps, 9), made.steps]
    assert len(expected) > 2
    assert committed_steps(made.run_dir) == expected


def test_eval_steps_is_the_distance_of_validations(made: Made) -> None:
    expected = [*range(7, made.steps, 7), made.steps]
    assert len(expected) > 2
    assert [record["step"] for record in made.records if "val_loss" in record] == expected


def test_dataset_path_is_written_by_tokenize_and_read_by_training(made: Made) -> None:
    dataset = open_dataset(made.folder / "made/shards")
    assert dataset.manifest.inputs.documents == DOCUMENTS
    assert made.manifest.progress.data_fingerprint == dataset.fingerprint


def test_the_splits_cut_the_documents_and_every_validation_reads_its_own(made: Made) -> None:
    manifest = open_dataset(made.folder / "made/shards").manifest
    assert (manifest.settings.train_split, manifest.settings.val_split) == (0.7, 0.3)
    val = manifest.documents("val")
    assert manifest.documents("train") + val == DOCUMENTS
    # By content hash, so the share is only about right: 7.2 documents, deviation 2.2.
    assert 3 <= val <= 12
    validated = {record["val_tokens"] for record in made.records if "val_loss" in record}
    assert validated == {manifest.tokens("val") - val}


def test_tokenizer_path_names_the_tokenizer_of_the_shards(made: Made) -> None:
    identity = open_dataset(made.folder / "made/shards").manifest.tokenizer
    copy = made.folder / "made/shards" / identity.file
    assert copy.read_bytes() == (made.folder / "words.json").read_bytes()
    assert identity.vocab_size == 300


def refusal(made: Made, document: dict, monkeypatch: pytest.MonkeyPatch) -> str:
    """What training says to data that the config does not describe."""
    monkeypatch.chdir(made.folder)
    path = made.folder / "other.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError) as error:
        open_matching_sources(ConfigLoader.load_from_file(path))
    return str(error.value)


def test_training_refuses_other_splits(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    other = changed({"data.train_split": 0.9, "data.val_split": 0.1})
    message = refusal(made, other, monkeypatch)
    assert "0.7" in message
    assert "0.9" in message


def test_training_refuses_another_tokenizer(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (made.folder / "words.json").read_text()
    other = made.folder / "other-words.json"
    other.write_text(text.replace("state", "etats"))
    assert other.read_text() != text
    document = changed({"data.tokenizer_path": "other-words.json"})
    assert "other-words.json" in refusal(made, document, monkeypatch)


def test_training_refuses_a_dataset_path_that_holds_none(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = changed({"data.dataset_path": "made/nothing"})
    assert "made/nothing" in refusal(made, document, monkeypatch)


COUNTING = """
from mamba_dist.commands.tokenize import main
from mamba_dist.data.tokenization import load_tokenizer

# Worker processes import this file under this name.
if __name__ == "__mp_main__":
    used = type(load_tokenizer("words.json"))
    plain = used.encode_flat

    def counted(self, texts):
        with open("calls", "a") as file:
            print(len(texts), file=file)
        return plain(self, texts)

    used.encode_flat = counted

if __name__ == "__main__":
    raise SystemExit(main())
"""


def test_preprocessing_batch_size_is_the_documents_of_a_tokenizer_call(made: Made) -> None:
    (made.folder / "counting.py").write_text(COUNTING)
    words = ["corpus", "--config", "old.yaml", "--output", "again", "--workers", "2"]
    result = subprocess.run(
        [sys.executable, "counting.py", *words],
        cwd=made.folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert (made.folder / "calls").read_text().split() == ["5", "5", "5", "5", "4"]
