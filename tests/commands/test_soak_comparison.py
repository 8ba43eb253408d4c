"""What the soak's comparison finds, on small made-up runs."""

from dataclasses import replace

import pytest

from mamba_dist.commands.soak.comparison import (
    Comparison,
    RankTrace,
    TrainedStep,
    compare,
    compare_validations,
)

STEPS = 6
TOLERANCE = 1e-3
ROWS = {s: tuple(f"row {s}.{n}" for n in range(4)) for s in range(1, STEPS + 1)}
REFERENCE = {s: TrainedStep(s, rows, 5.0 - s / 10) for s, rows in ROWS.items()}


def launched(name: str, first: int, last: int, *, ranks: int) -> list[RankTrace]:
    """The traces of a launch that trained those steps as the reference did."""
    share = 4 // ranks
    return [
        RankTrace(
            name,
            rank,
            ranks,
            tuple(
                replace(REFERENCE[s], rows=ROWS[s][rank * share : (rank + 1) * share])
                for s in range(first, last + 1)
            ),
        )
        for rank in range(ranks)
    ]


def traces() -> list[RankTrace]:
    """Three launches: the second trains steps 3 and 4 again, since they were not saved."""
    return [
        *launched("one", 1, 4, ranks=2),
        *launched("two", 3, 5, ranks=4),
        *launched("three", 6, 6, ranks=1),
    ]


def compared(
    found: list[RankTrace], metrics: dict[int, float] | None = None, **options: int
) -> Comparison:
    told = {s: one.loss for s, one in REFERENCE.items()} if metrics is None else metrics
    return compare(
        REFERENCE,
        found,
        metrics=told,
        total_steps=options.get("total_steps", STEPS),
        tolerance=TOLERANCE,
    )


def changed(trace: RankTrace, step: int, **fields: object) -> RankTrace:
    steps = [replace(one, **fields) if one.step == step else one for one in trace.steps]
    return replace(trace, steps=tuple(steps))


def test_a_run_in_pieces_that_read_the_same_is_the_same() -> None:
    found = compared(traces())
    assert found.faults == []
    assert (found.steps, found.trained_again, found.rows) == (6, 2, 4 * (4 + 3 + 1))


def test_a_loss_within_the_tolerance_is_measured() -> None:
    near = traces()
    near[0] = changed(near[0], 2, loss=REFERENCE[2].loss + TOLERANCE / 2)
    found = compared(near)
    assert found.faults == []
    assert found.largest_loss_difference == pytest.approx(TOLERANCE / 2)


@pytest.mark.parametrize("which", [0, 3, 6])
def test_a_changed_sample_of_any_rank_is_found_also_in_a_step_that_was_trained_again(
    which: int,
) -> None:
    wrong = traces()
    step = wrong[which].steps[0].step
    rows = ("another", *wrong[which].steps[0].rows[1:])
    wrong[which] = changed(wrong[which], step, rows=rows)
    [fault] = compared(wrong).faults
    assert f"{wrong[which].launch}, rank {wrong[which].rank}" in fault
    assert f"step {step}: trained on" in fault


def test_rows_of_another_rank_or_order_or_number_are_found() -> None:
    for rows in (ROWS[1][2:], ROWS[1][1::-1], ROWS[1][:1], ROWS[2][:2]):
        wrong = traces()
        wrong[0] = changed(wrong[0], 1, rows=rows)
        assert len(compared(wrong).faults) == 1


@pytest.mark.parametrize("loss", [REFERENCE[2].loss + 2 * TOLERANCE, float("nan")])
def test_a_changed_loss_is_found(loss: float) -> None:
    wrong = traces()
    wrong[1] = changed(wrong[1], 2, loss=loss)
    [fault] = compared(wrong).faults
    assert fault.startswith("one, rank 1 of 2, step 2: loss")


def test_a_step_that_nobody_trained_is_found() -> None:
    faults = compared(traces()[:-1]).faults
    assert faults == ["step 6: no launch trained it"]


def test_a_step_that_a_launch_left_out_is_found() -> None:
    wrong = traces()
    for rank in (0, 1):
        wrong[rank] = replace(
            wrong[rank], steps=tuple(one for one in wrong[rank].steps if one.step != 2)
        )
    faults = compared(wrong).faults
    assert "one, rank 0: step 3 after 1" in faults
    assert "step 2: no launch trained it" in faults


def test_a_step_of_which_the_last_launch_has_not_all_ranks_is_found() -> None:
    wrong = traces()
    wrong[2] = replace(wrong[2], steps=wrong[2].steps[:-1])
    [fault] = compared(wrong).faults
    assert fault.startswith("step 5: only ranks [1, 2, 3] of 4 trained it in two")


def test_an_earlier_launch_that_was_killed_within_a_step_is_no_fault() -> None:
    cut = traces()
    cut[1] = replace(cut[1], steps=cut[1].steps[:-1])
    assert compared(cut).faults == []


def test_steps_beyond_the_undisturbed_run_are_found() -> None:
    long = [*traces(), RankTrace("four", 0, 1, (TrainedStep(7, ROWS[1], 4.0),))]
    [fault] = compared(long).faults
    assert "step 7: the undisturbed run has no such step" in fault


def test_what_metrics_leave_out_or_tell_otherwise_is_found() -> None:
    told = {s: one.loss for s, one in REFERENCE.items()}
    del told[3]
    told[4] += 2 * TOLERANCE
    missing, wrong = compared(traces(), told).faults
    assert missing == "metrics.jsonl has no loss of step 3"
    assert wrong.startswith("metrics.jsonl gives step 4 a loss of 4.602, expected 4.6")


def test_many_faults_of_one_kind_are_counted() -> None:
    faults = compared([]).faults
    assert faults[-1] == "… and 1 more of this kind"
    assert len(faults) == 6


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({3: 4.0, 6: 3.5}, None),
        # A stop left the other one out.
        ({3: 4.0 + TOLERANCE / 2}, None),
        ({3: 4.0, 6: 3.6}, "step 6: validation loss 3.6, expected 3.5"),
        ({3: 4.0, 6: float("nan")}, "step 6: validation loss nan, expected 3.5"),
        ({3: 4.0, 5: 3.5}, "step 5 was validated, the undisturbed run did not"),
        ({}, "0 of 2 validations were made"),
    ],
)
def test_validation_losses_are_those_of_the_undisturbed_run(
    told: dict[int, float], fault: str | None
) -> None:
    found = Comparison()
    compare_validations({3: 4.0, 6: 3.5}, told, tolerance=TOLERANCE, found=found)
    assert found.faults == ([] if fault is None else [fault])
