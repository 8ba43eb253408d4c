import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_data import made_documents, write_dataset

from mamba_dist.data import packing_plan
from mamba_dist.data.dataset import TokenDataset
from mamba_dist.data.packing_plan import (
    PackingPlan,
    PlanKey,
    PlanTotals,
    Span,
    new_plan,
    open_plan,
    plan_key,
    plan_path,
)
from mamba_dist.data.planning import make_plan
from mamba_dist.errors import DataError

KEY = PlanKey("f" * 64, "train", "best_fit", 2048)


def write_plan(folder: Path, spans: list[list[Span]], key: PlanKey = KEY) -> Path:
    """A plan of given samples, written in groups of three."""
    with new_plan(plan_path(folder, key)) as writer:
        for at in range(0, len(spans), 3):
            some = spans[at : at + 3]
            flat = [span for sample in some for span in sample]
            writer.add(
                np.array([span.start for span in flat]),
                np.array([span.length for span in flat]),
                np.array([len(sample) for sample in some]),
            )
        flat = [span for sample in spans for span in sample]
        labels = sum(span.length for span in flat)
        writer.finish(key, PlanTotals(len(spans), len(flat), labels, len(flat), 0))
    return plan_path(folder, key)


def made_spans(samples: int) -> list[list[Span]]:
    rng = np.random.default_rng(samples)
    return [
        [Span(int(rng.integers(2**40)), int(rng.integers(1, 2**24))) for _ in range(1 + i % 4)]
        for i in range(samples)
    ]


def read_all(plan: PackingPlan) -> list[list[Span]]:
    return [plan.spans(sample) for sample in range(len(plan))]


def advice(folder: Path, key: PlanKey = KEY) -> str:
    return (
        f"make it by `python tools/plan_packing.py {folder} --packing {key.packing} "
        f"--sequence-length {key.sequence_length}`"
    )


@pytest.mark.parametrize("samples", [1, 3, 511, 512, 513, 2000])
def test_what_was_written_is_read_back(tmp_path: Path, samples: int) -> None:
    spans = made_spans(samples)
    write_plan(tmp_path, spans)
    plan = open_plan(tmp_path, KEY)
    assert read_all(plan) == spans
    assert plan.totals.samples == samples
    for outside in (-1, samples):
        with pytest.raises(IndexError):
            plan.spans(outside)


def test_a_missing_plan_is_an_error_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_plan(tmp_path, KEY)
    path = tmp_path / "train-best_fit-2048.plan"
    assert str(caught.value) == (
        f"data.packing best_fit needs the plan {path}, which does not exist; {advice(tmp_path)}"
    )


@pytest.mark.parametrize("lost", [1, 8, 5000])
def test_a_plan_cut_short_is_refused_at_the_start(tmp_path: Path, lost: int) -> None:
    path = write_plan(tmp_path, made_spans(900))
    size = path.stat().st_size
    os.truncate(path, size - lost)
    with pytest.raises(DataError) as caught:
        open_plan(tmp_path, KEY)
    assert f"{path} is cut short: {size - lost} bytes, not {size}; make it by" in str(caught.value)
    os.truncate(path, 0)
    with pytest.raises(DataError, match=f"cannot read {path}: .* empty file; make it by"):
        open_plan(tmp_path, KEY)
    path.write_bytes(b"mamba")
    with pytest.raises(DataError, match="is damaged: its first page is not a plan's; make it by"):
        open_plan(tmp_path, KEY)


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "e" * 64), ("packing", "pad"), ("sequence_length", 1024)]
)
def test_the_plan_of_another_data_set_or_mode_is_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    other = PlanKey(**{**vars(KEY), field: value})
    made = write_plan(tmp_path, made_spans(5), other)
    if made != plan_path(tmp_path, KEY):
        shutil.move(made, plan_path(tmp_path, KEY))
    with pytest.raises(DataError) as caught:
        open_plan(tmp_path, KEY)
    assert f"its {field} is {value}, this one's {getattr(KEY, field)}" in str(caught.value)
    assert advice(tmp_path) in str(caught.value)


def test_a_plan_of_another_version_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(packing_plan, "PLAN_FORMAT_VERSION", 2)
        write_plan(tmp_path, made_spans(5))
    with pytest.raises(DataError, match="has plan version 2, this program reads 1"):
        open_plan(tmp_path, KEY)


def test_a_flipped_bit_anywhere_is_found_by_whoever_reads_it(tmp_path: Path) -> None:
    spans = made_spans(2000)
    path = write_plan(tmp_path, spans)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = whole.index(b"    ")
    places = [0, 30, header - 2, 4096, len(whole) - 1, *rng.integers(4096, len(whole), 30).tolist()]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is damaged.*make it by `python tools/plan_packing"):
            read_all(open_plan(tmp_path, KEY))
    path.write_bytes(whole)
    assert read_all(open_plan(tmp_path, KEY)) == spans


def test_opening_reads_the_first_page_and_a_sample_only_its_own(tmp_path: Path) -> None:
    # What is not read cannot be found damaged.
    spans = made_spans(5000)
    path = write_plan(tmp_path, spans)
    content = bytearray(path.read_bytes())
    content[3 * 4096] ^= 1
    path.write_bytes(content)
    plan = open_plan(tmp_path, KEY)
    assert plan.spans(0) == spans[0]
    assert plan.spans(4999) == spans[4999]
    with pytest.raises(DataError, match=f"{path} is damaged between bytes 12288 and 16383"):
        read_all(plan)


def test_planning_that_fails_or_is_killed_leaves_no_plan_and_is_taken_over(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_plan(plan_path(tmp_path, KEY)):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    left_by_a_kill = tmp_path / ".train-best_fit-2048.plan.partial"
    left_by_a_kill.write_bytes(b"x" * 50_000)
    spans = made_spans(4)
    path = write_plan(tmp_path, spans)
    assert list(tmp_path.iterdir()) == [path]
    assert read_all(open_plan(tmp_path, KEY)) == spans


def test_two_processes_do_not_make_the_same_plan_at_once(tmp_path: Path) -> None:
    with (
        new_plan(plan_path(tmp_path, KEY)),
        pytest.raises(DataError, match=r"another process is making .*plan; wait for it to end"),
    ):
        write_plan(tmp_path, made_spans(3))


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot make .*\.plan: .*partial: No such file"):
        write_plan(tmp_path / "none", made_spans(3))


def test_a_plan_made_before_the_data_set_was_replaced_is_refused(tmp_path: Path) -> None:
    def made(seed: int) -> TokenDataset:
        return write_dataset(tmp_path, made_documents(80, seed=seed), made_documents(9, seed=2))

    old = made(1)
    make_plan(tmp_path, old.manifest, packing="pad", length=16, advance=lambda tokens: None)
    open_plan(tmp_path, plan_key(old.fingerprint, "pad", 16))
    with pytest.raises(DataError, match="is the plan of another data set: its fingerprint is"):
        open_plan(tmp_path, plan_key(made(4).fingerprint, "pad", 16))
