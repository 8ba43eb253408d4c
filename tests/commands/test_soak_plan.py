"""The soak's schedule, and what it takes for allowed of an exit code."""

from itertools import islice

import pytest

from mamba_dist.commands.soak import main
from mamba_dist.commands.soak.checks import allowed_codes
from mamba_dist.commands.soak.launch import Spread
from mamba_dist.commands.soak.plan import RoundPlan, schedule


def rounds(seed: int, count: int) -> list[RoundPlan]:
    return list(islice(schedule(seed), count))


def test_the_seed_alone_makes_the_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert rounds(3, 50) == rounds(3, 50)
    assert rounds(3, 80)[:50] == rounds(3, 50)
    assert rounds(4, 50) != rounds(3, 50)
    assert main(["--rounds", "12", "--seed", "3", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{one.number:4} {one}" for one in rounds(3, 12)]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hundred_rounds_meet_everything(seed: int) -> None:
    plans = rounds(seed, 100)
    assert {one.launcher for one in plans} == {"python", "torchrun", "deepspeed"}
    assert {one.ranks for one in plans} == {1, 2, 3, 4}
    assert {one.engine for one in plans} == {"zero-0", "zero-1", "zero-2", "zero-3", "fsdp2"}
    assert {one.moment for one in plans} == {"start", "step", "save"}
    assert {one.event for one in plans} == {one.event for one in rounds(9, 400)}
    damages = {one.damage.kind for one in plans if one.damage is not None}
    assert damages == {"flip a byte", "truncate", "delete"}
    assert sum(one.started_twice for one in plans) >= 3
    assert sum(one.junk for one in plans) >= 10
    assert sum(one.accumulates for one in plans) >= 30


def test_no_round_asks_for_what_its_launch_cannot_give() -> None:
    for one in rounds(5, 300):
        assert one.launcher != "python" or (one.ranks == 1 and not one.strikes_launcher)
        assert one.event != "stop a rank" or (one.ranks > 1 and one.moment == "step")
        assert one.event != "stop a rank" or one.after_steps > 1
        assert not one.event.startswith("full disk") or one.moment == "step"
        assert 12 % one.ranks == 0
        spread = Spread(one.launcher, one.ranks, one.engine, accumulates=one.accumulates)
        [size] = [int(w.partition("=")[2]) for w in spread.overrides() if "micro_batch" in w]
        share, rest = divmod(12, one.ranks * size)
        assert rest == 0
        assert (share > 1) == one.accumulates


def test_an_exit_code_is_allowed_for_its_event_only() -> None:
    for plan in rounds(7, 300):
        for stepped in (True, False):
            allowed = allowed_codes(plan, stepped=stepped, done=True)
            assert allowed
            # The end of a run that was not at its end, training that is broken.
            assert not allowed & {0, 65}
            if plan.launcher == "python" and stepped:
                assert allowed in ({75}, {-9})
