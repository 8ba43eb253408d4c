"""Faults on one of two ranks: skipped together, gone back from, and ended clearly; one launch."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import CheckpointManifest, read_manifest
from mamba_dist.telemetry.metrics import read_metrics

WORKER = Path(__file__).with_name("guard_worker.py")
STAGES = (0, 1, 3)
CASES = [
    *("plain", "single", "spikes", "spikes-resumed", "broken", "refused", "early"),
    *(f"{kind}-{stage}" for stage in STAGES for kind in ("row", "never")),
    "row-resumed",
]


@dataclass(frozen=True)
class Made:
    """What the runs left, and by case what each of the two ranks saw."""

    folder: Path
    seen: dict[str, list[dict[str, Any]]]

    def last(self, name: str) -> CheckpointManifest:
        return read_manifest(checkpoint_folder(self.folder / name, 12))

    def losses(self, name: str) -> dict[float | None, float | None]:
        """By step; the later line of a step that was trained twice counts."""
        return {r["step"]: r["loss"] for r in read_metrics(self.folder / name) if "loss" in r}

    def said(self, name: str, rank: int = 0) -> list[str]:
        """Without what a crowded machine adds: that the loader falls behind."""
        return [s for s in self.seen[name][rank]["said"] if not s.startswith("the loader ")]


@pytest.fixture(scope="module")
def made(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[str]]
) -> Made:
    folder = tmp_path_factory.mktemp("guard")
    config = {
        "schema_version": 2,
        "model": {"d_model": 32, "n_layers": 1, "vocab_size": 304},
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "max_steps": 12,
            "max_skipped_steps": 3,
            "eval_steps": None,
            "eval_sequences": 2,
            "precision": "fp32",
        },
        "data": {
            "dataset_path": str(tiny_data / "shards"),
            "tokenizer_path": str(tiny_data / "tokenizer.json"),
            "sequence_length": 64,
            "num_workers": 0,
        },
        "engine": {"zero_stage": 1},
        "checkpoint": {"save_steps": 3, "keep_last": 100},
        "telemetry": {"log_steps": 1, "tensorboard": False, "progress_bar": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    printed = run_ranks(WORKER, str(path), str(folder), *CASES, world_size=2)
    ranks = [
        [json.loads(line) for line in one.splitlines() if line.startswith("{")] for one in printed
    ]
    seen = {both[0]["name"]: list(both) for both in zip(*ranks, strict=True)}
    assert list(seen) == CASES, sys.version
    return Made(folder, seen)


def test_a_fault_on_one_rank_skips_the_step_on_all_and_names_the_samples(made: Made) -> None:
    assert [end["step"] for end in made.seen["single"]] == [12, 12]
    gradient, loss = made.said("single")
    # Of the first the loss is fine, of the second the gradients are: the label had probability 0.
    assert gradient.startswith("step 5 skipped on all ranks: loss 5.")
    assert gradient.endswith("; samples 16 to 19")
    assert loss.startswith("step 8 skipped on all ranks: loss inf, gradient norm ")
    assert loss.endswith("; samples 28 to 31")
    assert made.said("single", rank=1) == [], "one rank tells it"
    assert made.last("single").adam_steps == 10
    records = {r["step"]: r for r in read_metrics(made.folder / "single") if "loss" in r}
    assert [step for step, r in records.items() if r["skipped_steps"]] == [5, 8]
    plain = made.losses("plain")
    assert {s: x for s, x in made.losses("single").items() if s < 5} == {
        s: x for s, x in plain.items() if s < 5
    }


def test_spikes_are_skipped_by_gradient_and_by_loss_alike_after_a_resume(made: Made) -> None:
    gradient, loss = made.said("spikes")
    assert gradient.startswith("step 9 skipped on all ranks: loss 5.")
    assert " above " in gradient.partition("gradient norm ")[2]
    assert " above " in loss.partition(", gradient norm ")[0]
    assert " above " not in loss.partition(", gradient norm ")[2]
    last = made.last("spikes")
    assert (last.adam_steps, len(last.progress.recent_losses)) == (10, 8)
    resumed = made.last("spikes-resumed")
    assert resumed.fragments == last.fragments
    assert resumed.progress == last.progress
    assert made.said("spikes-resumed")[-2:] == [gradient, loss]


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_rollback_the_run_is_one_that_never_saw_the_samples(made: Made, stage: int) -> None:
    row, never = made.last(f"row-{stage}"), made.last(f"never-{stage}")
    assert row.fragments == never.fragments
    assert row.adam_steps == never.adam_steps == 12
    assert row.progress.trained_tokens == never.progress.trained_tokens
    assert row.progress.next_sample == never.progress.next_sample == (12 + 3) * 4
    assert made.losses(f"row-{stage}") == made.losses(f"never-{stage}")
    assert made.losses(f"row-{stage}")[12] != made.losses("plain")[12]


def test_a_rollback_is_one_line_and_one_record_and_sets_aside_what_it_takes_back(
    made: Made,
) -> None:
    folder = made.folder / "row-1"
    [line] = [each for each in made.said("row-1") if "rollback" in each]
    assert line.endswith(
        f"rollback 1 of 2 to {checkpoint_folder(folder, 6)}, passing over samples 28 to 39 of "
        "steps 8 to 10"
    )
    assert committed_steps(folder) == [3, 6, 9, 12]
    # Saved within the row: its samples had been read, its steps are trained again.
    assert checkpoint_folder(folder, 9).with_suffix(".abandoned").is_dir()
    [record] = [r for r in read_metrics(folder) if "rolled_back_from" in r]
    assert list(record.values()) == [6, 10, 28, 39]


def test_a_run_resumed_after_a_rollback_does_not_meet_the_samples_again(made: Made) -> None:
    assert not [line for line in made.said("row-resumed") if "skipped" in line]
    assert made.last("row-resumed").fragments == made.last("row-1").fragments
    assert made.last("row-resumed").progress == made.last("row-1").progress


def test_a_place_that_breaks_again_is_left_behind_whole_and_then_the_run_ends(made: Made) -> None:
    for end in made.seen["broken"]:
        assert end["exit_code"] == 65
        assert "3 steps in a row were skipped, the last one 9" in end["error"]
        assert "after 2 rollbacks (training.max_rollbacks)" in end["error"]
    back = [line.partition(", passing over ")[2] for line in made.said("broken")]
    # Step 7 was fine, but the second time it is no longer trusted.
    assert [each for each in back if each] == [
        "samples 28 to 39 of steps 8 to 10",
        "samples 24 to 51 of steps 7 to 10",
    ]


@pytest.mark.parametrize("name", ["refused", "early"])
def test_without_a_way_back_the_run_ends_at_the_first_row(made: Made, name: str) -> None:
    """Rollbacks are off, or the row comes before the first checkpoint, which is left alone."""
    for end in made.seen[name]:
        assert end["exit_code"] == 65
        assert end["error"].startswith("3 steps in a row were skipped")
    assert not [line for line in made.said(name) if "rollback" in line]
    assert not list((made.folder / name / "checkpoints").glob("*.abandoned"))
