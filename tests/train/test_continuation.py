"""What may change at a resume: real checkpoints of a run, and configs that differ from theirs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saved_run import save_run

from mamba_dist.checkpoint.history import recorded_order
from mamba_dist.checkpoint.layout import checkpoint_folder
from mamba_dist.checkpoint.manifest import Progress
from mamba_dist.checkpoint.reader import CheckpointReader, open_checkpoint
from mamba_dist.config.schema import (
    CheckpointConfig,
    DataConfig,
    MambaConfig,
    RunConfig,
    TrainingConfig,
)
from mamba_dist.data.segments import (
    RunOrder,
    SourceContent,
    SourceRecord,
    first_segment,
    mixture_fingerprint,
)
from mamba_dist.errors import CheckpointError, ConfigError
from mamba_dist.train.build import planned_steps
from mamba_dist.train.continuation import continued_order
from mamba_dist.train.state import beginning, saved_progress

CONTENT = SourceContent(1_234_567, 10, 99, 3, 2, "a" * 64, 320, 0, 0.9, 0.1)
WORKER = Path(__file__).with_name("differing_data_worker.py")
WEB = SourceRecord("data/web", "f" * 64, 3.0, None, 100, CONTENT)
CODE = SourceRecord("data/code", "c" * 64, 1.0, 2, 30, CONTENT)


def config(*accepted: str, length: dict[str, int] | None = None, **data: Any) -> RunConfig:
    length = length or {"max_steps": 9}
    return RunConfig(
        model=MambaConfig(d_model=16, n_layers=1, vocab_size=320),
        training=TrainingConfig(warmup_steps=1, global_batch_size=8, micro_batch_size=2, **length),
        data=DataConfig(sequence_length=64, **data),
        checkpoint=CheckpointConfig(accept_changes=list(accepted)),
    )


def order_of(*sources: SourceRecord, batch: int = 8) -> RunOrder:
    return RunOrder([first_segment(sources, global_batch_size=batch)], seed=0, shuffle=True)


def saved(
    run_dir: Path, order: RunOrder, *, step: int = 5, recorded: bool = True
) -> CheckpointReader:
    """The checkpoint after a step; not `recorded`: as it was written before there were mixtures."""
    save_run(run_dir, config(), order, step=step, recorded=recorded)
    return open_checkpoint(run_dir, notice=pytest.fail)


def refusal(reader: CheckpointReader, now: RunOrder, *accepted: str, **data: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        continued_order(reader, config(*accepted, **data), now)
    return str(error.value)


def test_the_segments_of_a_run_are_read_back_from_its_checkpoint(tmp_path: Path) -> None:
    order = order_of(WEB, CODE).changed(step=3, sources=[WEB], global_batch_size=4)
    reader = saved(tmp_path, order)
    assert reader.manifest.progress.segments == order.segments
    again = recorded_order(reader.manifest, folder=reader.folder, sources=[])
    assert again.segments == order.segments
    assert reader.manifest.progress.data_fingerprint == WEB.fingerprint
    assert reader.manifest.progress.global_batch_size == 4


def test_an_unchanged_run_goes_on_with_its_own_segments(tmp_path: Path) -> None:
    order = order_of(WEB, CODE)
    reader = saved(tmp_path, order)
    same = [replace(CODE, weight=0.5), replace(WEB, weight=1.5)]  # the same shares
    assert continued_order(reader, config(), order_of(*same)).segments == order.segments


@pytest.mark.parametrize(
    ("now", "kept"),
    [
        (order_of(WEB), True),
        (order_of(replace(WEB, path="elsewhere/web")), True),
        (order_of(WEB).without(range(3, 5)), True),
        (order_of(WEB).changed(step=5, sources=[WEB, CODE], global_batch_size=8), False),
        (order_of(WEB).changed(step=5, sources=None, global_batch_size=16), False),
    ],
)
def test_the_window_for_spikes_is_that_of_the_same_mixture_and_batch(
    tmp_path: Path, now: RunOrder, kept: bool
) -> None:
    reader = saved(tmp_path, order_of(WEB))
    window = {"recent_losses": (2.5, 2.4), "recent_grad_norms": (1.0, 1.5)}
    progress = reader.manifest.progress.model_copy(update=window)
    reader.manifest = reader.manifest.model_copy(update={"progress": progress})
    found = saved_progress(reader, now)
    assert found.recent_losses == (window["recent_losses"] if kept else ())
    assert found.recent_grad_norms == (window["recent_grad_norms"] if kept else ())
    assert (found.step, found.segments) == (5, now.segments)


def test_data_that_only_moved_is_the_same_data(tmp_path: Path) -> None:
    reader = saved(tmp_path, order_of(WEB, CODE))
    moved = replace(WEB, path="disk2/web")
    order = continued_order(reader, config(), order_of(moved, CODE))
    assert {s.path for s in order.segments[-1].sources} == {"disk2/web", "data/code"}
    assert len(order.segments) == 1
    # From now on a change of the data there is a change of this data set.
    again = saved(tmp_path / "again", order)
    other = replace(moved, fingerprint="0" * 64)
    assert "disk2/web changed since" in refusal(again, order_of(other, CODE))


def test_data_that_changed_where_it_lies_is_refused_with_what_changed(tmp_path: Path) -> None:
    reader = saved(tmp_path, order_of(WEB, CODE))
    changed = replace(WEB, fingerprint="0" * 64, content=replace(CONTENT, train_tokens=1_230_000))
    for accepted in ((), ("data_mixture",)):
        message = refusal(reader, order_of(changed, CODE), *accepted)
        assert "data/web changed since the run read it" in message
        assert "train tokens was 1,234,567, is 1,230,000; the tokenizer is the same" in message


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ((WEB,), ["data/code left the mixture", "share of data/web was 0.75, is 1"]),
        ((WEB, CODE, replace(WEB, path="n", fingerprint="e")), ["n is new in the mixture"]),
        ((replace(WEB, weight=4.0), CODE), ["the share of data/web was 0.75, is 0.8"]),
        ((WEB, replace(CODE, max_epochs=None)), ["max_epochs of data/code was 2, is null"]),
    ],
)
def test_another_mixture_needs_consent_and_then_begins_a_segment(
    tmp_path: Path, now: tuple[SourceRecord, ...], said: list[str]
) -> None:
    before = order_of(WEB, CODE)
    reader = saved(tmp_path, before)
    for accepted in ((), ("global_batch_size",)):
        message = refusal(reader, order_of(*now), *accepted)
        assert all(words in message for words in said)
        assert "from step 5 on by checkpoint.accept_changes=[data_mixture]" in message
    order = continued_order(reader, config("data_mixture"), order_of(*now))
    assert order.segments[:-1] == before.segments
    last = order.segments[-1]
    assert (last.first_step, last.first_position, last.global_batch_size) == (5, 40, 8)
    taken = before.taken(40)
    assert {s.fingerprint: s.taken for s in last.sources} == {
        s.fingerprint: taken.get(s.fingerprint, 0) for s in now
    }


def test_another_batch_size_needs_consent_and_then_begins_a_segment(tmp_path: Path) -> None:
    reader = saved(tmp_path, order_of(WEB))
    message = refusal(reader, order_of(WEB, batch=16), "data_mixture")
    assert "the run has 8 sequences per step, this start would have 16" in message
    assert "checkpoint.accept_changes=[global_batch_size]" in message
    order = continued_order(reader, config("global_batch_size"), order_of(WEB, batch=16))
    assert order.positions(4) == range(32, 40)
    assert order.positions(5) == range(40, 56)
    before = order_of(WEB)
    assert [order.locate(g)[1:] for g in range(90)] == [before.locate(g)[1:] for g in range(90)]
    assert order.segments[-1].mixture_position == 0
    both = refusal(reader, order_of(WEB, CODE, batch=16))
    assert "accept_changes=[data_mixture, global_batch_size]" in both


@pytest.mark.parametrize(("field", "value"), [("sequence_length", 32), ("seed", 1)])
def test_what_the_order_within_a_source_depends_on_never_changes(
    tmp_path: Path, field: str, value: int
) -> None:
    reader = saved(tmp_path, order_of(WEB))
    other = config("data_mixture", "global_batch_size")
    other = other.model_copy(update={"data": other.data.model_copy(update={field: value})})
    with pytest.raises(CheckpointError, match=f"data.{field} = "):
        continued_order(reader, other, order_of(WEB))


def test_a_source_cut_into_other_samples_is_refused(tmp_path: Path) -> None:
    reader = saved(tmp_path, order_of(WEB))
    message = refusal(reader, order_of(replace(WEB, samples=90)), "data_mixture")
    assert "gives 90 samples an epoch, gave 100" in message


def test_a_checkpoint_older_than_mixtures_goes_on_in_its_old_order(tmp_path: Path) -> None:
    before = order_of(WEB)
    reader = saved(tmp_path, before, recorded=False)
    assert reader.manifest.progress.segments == ()
    order = continued_order(reader, config(), order_of(WEB))
    assert [order.locate(g) for g in range(300)] == [before.locate(g) for g in range(300)]
    mixed = continued_order(reader, config("data_mixture"), order_of(WEB, CODE))
    assert [s.taken for s in mixed.segments[-1].sources] == [0, 40]
    assert [mixed.locate(g).number for g in range(40)] == [
        before.locate(g).number for g in range(40)
    ]
    web = [s for s in map(mixed.locate, range(40, 110)) if (s.source, s.epoch) == (1, 0)]
    seen = {before.locate(g).number for g in range(40)}
    assert web
    assert not seen & {sample.number for sample in web}
    limited = replace(WEB, max_epochs=2)
    assert "max_epochs of data/web was null, is 2" in refusal(reader, order_of(limited))
    gone = refusal(reader, order_of(CODE), "data_mixture")
    assert f"another data set (fingerprint {WEB.fingerprint}) than data/code" in gone


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        # 5 steps of 8 are 40 sequences of 64 tokens; then 16 sequences a step.
        ({"max_steps": 50}, 50),
        ({"max_tokens": 64 * 120}, 10),
        ({"max_tokens": 64 * 121}, 11),
        ({"num_epochs": 2}, 15),
    ],
)
def test_a_changed_batch_keeps_the_length_that_the_config_asks_for(
    tmp_path: Path, length: dict[str, int], steps: int
) -> None:
    reader = saved(tmp_path, order_of(WEB))
    wider = config("global_batch_size", length=length)
    order = continued_order(reader, wider, order_of(WEB, batch=16))
    assert planned_steps(wider, order) == steps


@pytest.mark.parametrize("length", [{"max_steps": 15}, {"max_tokens": 64 * 115}, {"num_epochs": 1}])
def test_samples_that_are_passed_over_shorten_no_run(length: dict[str, int]) -> None:
    order = order_of(WEB)
    assert planned_steps(config(length=length), order.without(range(4, 7))) == planned_steps(
        config(length=length), order
    )
    limited = order_of(replace(WEB, max_epochs=1), CODE).without(range(4, 7))
    with pytest.raises(ConfigError, match=r"exhausted after 160 samples.*shorten the run to 17"):
        planned_steps(config(length={"max_steps": 18}), limited)


def test_passes_over_a_new_mixture_count_only_what_was_read_of_it(tmp_path: Path) -> None:
    one_pass = config("data_mixture", length={"num_epochs": 1})
    reader = saved(tmp_path, order_of(WEB), step=12)  # 96 samples of 100
    replaced = continued_order(reader, one_pass, order_of(CODE))
    assert planned_steps(one_pass, replaced) == 12 + 30 // 8
    joined = continued_order(reader, one_pass, order_of(WEB, CODE))
    assert planned_steps(one_pass, joined) == 12 + (100 + 30 - 96) // 8
    # A second change: what was read of both counts, of the one that is left.
    again = saved(tmp_path / "again", joined, step=15)
    back = continued_order(again, one_pass, order_of(CODE))
    taken = joined.taken(15 * 8)[CODE.fingerprint]
    assert 0 < taken < 24
    assert planned_steps(one_pass, back) == 15 + (30 - taken) // 8


def test_a_run_longer_than_its_limited_sources_is_refused_with_what_is_possible() -> None:
    limited = order_of(replace(WEB, max_epochs=1), CODE)
    assert planned_steps(config(length={"max_steps": 20}), limited) == 20
    with pytest.raises(ConfigError, match=r"exhausted after 160 samples.*shorten the run to 20"):
        planned_steps(config(length={"max_steps": 21}), limited)


def test_the_progress_of_a_mixture_names_all_its_data() -> None:
    progress = beginning(order_of(WEB, CODE))
    assert progress.data_fingerprint == mixture_fingerprint([CODE, WEB])
    assert progress.data_fingerprint not in (WEB.fingerprint, CODE.fingerprint)
    assert Progress.model_validate_json(progress.model_dump_json()) == progress


def test_a_new_source_of_another_tokenizer_is_refused_whatever_is_accepted(tmp_path: Path) -> None:
    reader = saved(tmp_path, order_of(WEB))
    other = replace(CODE, content=replace(CONTENT, tokenizer_sha256="b" * 64))
    message = refusal(reader, order_of(other), "data_mixture")
    assert "ids of another tokenizer (tokenizer_sha256 aaaa" in message


def test_a_source_that_left_and_changed_where_it_lies_is_refused_when_it_comes_back(
    tmp_path: Path,
) -> None:
    both = order_of(WEB, CODE)
    alone = both.changed(step=3, sources=[WEB], global_batch_size=8)
    reader = saved(tmp_path, alone)
    again = replace(CODE, fingerprint="d" * 64, path="data/../data/code")
    assert "data/code changed since the run read it" in refusal(
        reader, order_of(WEB, again), "data_mixture"
    )


def test_a_source_that_moves_while_the_batch_changes_is_recorded_where_it_lies(
    tmp_path: Path,
) -> None:
    reader = saved(tmp_path, order_of(WEB, CODE))
    moved = replace(CODE, path="elsewhere/code")
    order = continued_order(reader, config("global_batch_size"), order_of(WEB, moved, batch=4))
    assert [len(order.segments), order.segments[-1].global_batch_size] == [2, 4]
    for segment in order.segments:
        assert {source.path for source in segment.sources} == {"data/web", "elsewhere/code"}


def test_a_known_source_may_take_the_place_of_one_that_left(tmp_path: Path) -> None:
    order = order_of(WEB, CODE).changed(step=3, sources=[CODE], global_batch_size=8)
    reader = saved(tmp_path, order)
    there = replace(CODE, path="data/web")
    assert continued_order(reader, config(), order_of(there)).segments[-1].sources[0].path == (
        "data/web"
    )


def test_ranks_that_find_different_data_or_checkpoints_do_not_begin(
    run_ranks: Callable[..., list[str]], tmp_path: Path
) -> None:
    checkpoint_folder(tmp_path / "run-1", 4).mkdir(parents=True)
    outputs = run_ranks(WORKER, str(tmp_path / "run"), world_size=2)
    seen = ["rank 0 sees none", "rank 1 sees 1, the newest of step 4"]
    for rank, output in enumerate(outputs):
        at_start, of_checkpoints = output.strip().splitlines()[-2:]
        # The folders are part of the config, and the copies of data of what it leads to.
        assert at_start.startswith("3 problems at the start of the run:  1. the config differs: ")
        for other in range(2):
            assert f"data/copy (fingerprint {12 * str(other)}, 100 samples) on " in at_start
        assert f"(rank 1): {tmp_path / 'run-1'} is not seen as rank 0 wrote it" in at_start
        assert f"the ranks see different checkpoints, {seen[rank]}" in of_checkpoints
        assert of_checkpoints.endswith("True")
