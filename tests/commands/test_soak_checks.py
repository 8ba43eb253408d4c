"""What the soak takes for wrong after a round, on made-up ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.commands.soak.checks import Seen, faults_of, resumed_step
from mamba_dist.commands.soak.disturbance import Struck
from mamba_dist.commands.soak.plan import RoundPlan
from mamba_dist.commands.soak.survey import Survey

VICTIM = Path("run/checkpoints/step-00000012/rank-00001.safetensors")
PLAN = RoundPlan(
    number=1,
    launcher="torchrun",
    ranks=2,
    engine="zero-2",
    loaders=0,
    accumulates=False,
    event="SIGTERM to a rank",
    moment="step",
    after_steps=3,
    fraction=0.5,
    victim=0.5,
    started_twice=False,
    junk=True,
    damage=None,
)
LOG = f"""\
10:00:00 removed step-00000016.partial, which an interrupted save left behind
10:00:01 [rank 1] passing over step 12: {VICTIM} does not hash to what was written
10:00:02 resumed after step 8 from run/checkpoints/step-00000008
10:00:03 stopped by SIGTERM after step 13; start again to continue
"""
WELL = Seen(
    plan=PLAN,
    struck=Struck(step=12, newest=8),
    code=1,
    log=LOG,
    before=Survey({4: "a", 8: "b"}, {12: "a fault"}, ("step-00000016.partial",)),
    after=Survey({4: "a", 8: "b", 12: "c", 13: "d"}, {}, ()),
    damaged={12: VICTIM},
    first_step=9,
    resumed=8,
    total_steps=100,
)


def test_a_round_in_which_all_went_well_has_no_fault() -> None:
    assert faults_of(WELL) == []
    assert resumed_step(LOG, 9) == 8
    assert resumed_step("nothing said", 1) == 0
    assert resumed_step("nothing said", None) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"code": 75}, "exit code 75, allowed are [1]"),
        ({"code": 0}, "exit code 0 before the last step"),
        (
            {"resumed": 4, "first_step": 5},
            "went on from step 4, the newest whole or written checkpoint was of 8",
        ),
        ({"first_step": 10}, "went on from step 8, and trained 10 first"),
        ({"log": LOG.replace("rank-00001.s", "rank-00000.s")}, "without naming rank-00001"),
        ({"log": LOG.replace("passing over", "using")}, "passed over step 12 without naming"),
        ({"log": LOG.replace("removed", "kept")}, "began with step-00000016.partial"),
        (
            {"after": Survey({8: "b", 13: "d"}, {}, ())},
            "the whole checkpoint of step 4 is gone, newer: [8, 13]",
        ),
        ({"after": Survey({4: "a", 8: "x", 13: "d"}, {}, ())}, "step 8 was written again"),
        ({"after": Survey({4: "a", 8: "b"}, {}, ())}, "left a checkpoint of 8"),
        ({"struck": Struck(step=12, newest=16)}, "is of step 13, it was of 16"),
        (
            {"after": Survey({4: "a", 8: "b", 13: "d"}, {16: "cut short"}, ())},
            "the checkpoint of step 16 is damaged, and not by the soak: cut short",
        ),
        ({"plan": replace(PLAN, event="stop a rank")}, "was found by nobody"),
        ({"struck": Struck(12, 8, faults=("said there",))}, "said there"),
        (
            {"struck": Struck(None, 8, missed="the launch ended before it")},
            "it ended by itself with exit code 1",
        ),
    ],
)
def test_what_went_wrong_is_said(change: dict[str, Any], fault: str) -> None:
    told = faults_of(replace(WELL, **change))
    assert len(told) == 1, told
    assert fault in told[0]


def test_a_start_goes_on_from_a_save_that_lacked_nothing_but_its_commit() -> None:
    before = Survey({4: "a", 8: "b"}, {}, ("step-00000011.partial",), written=(11,))
    ignored = replace(WELL, before=before, damaged={})
    assert faults_of(ignored) == [
        "went on from step 8, the newest whole or written checkpoint was of 11",
        "began with step-00000011.partial in its folder, and does not say: /step-00000011, all of "
        "which an interrupted save left",
    ]
    said = "committed run/checkpoints/step-00000011, all of which an interrupted save left"
    went_on = replace(ignored, log=said, resumed=11, first_step=12)
    assert faults_of(went_on) == []


def test_retention_may_take_a_checkpoint_once_three_newer_are_whole() -> None:
    after = Survey({8: "b", 12: "c", 13: "d"}, {}, ())
    assert faults_of(replace(WELL, after=after)) == []


def test_a_run_may_come_to_its_end_while_it_notices_its_event() -> None:
    ended = replace(WELL, code=0, log=LOG + "finished at step 20", total_steps=20)
    assert faults_of(ended) == []
    unheard = replace(WELL, code=0, log=LOG + "finished at step 40", total_steps=40)
    assert faults_of(unheard) == ["trained 28 steps to its end after the event"]


def test_a_damaged_checkpoint_that_an_interrupted_start_left_is_none_that_was_lost() -> None:
    struck = Struck(step=None, newest=12)
    left = Survey(WELL.before.whole, WELL.before.damaged, ())
    early = replace(WELL, struck=struck, after=left, log="", first_step=None, resumed=None)
    assert faults_of(early) == []
