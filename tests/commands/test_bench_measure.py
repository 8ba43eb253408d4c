"""What stands behind the tables of tools/bench.py: the gate, the rounds that count, the workers."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mamba_dist.commands.bench import main, measure, train
from mamba_dist.commands.bench.cases import Case, our_op
from mamba_dist.commands.bench.child import ChildWorker
from mamba_dist.commands.bench.limit import limit_model
from mamba_dist.commands.bench.load import cpu_times, other_load_cores
from mamba_dist.commands.bench.measure import MIN_ROUNDS, Plan, Result
from mamba_dist.commands.bench.ops import OpJob
from mamba_dist.commands.bench.report import figures, records, table
from mamba_dist.commands.bench.spec import (
    DTYPES,
    Group,
    NotMeasuredError,
    OpSpec,
    Outcome,
    Row,
    TrainSpec,
)
from mamba_dist.commands.bench.train import TrainJob, build_model
from mamba_dist.commands.bench.worker import JobRunner, make_job
from mamba_dist.model import layers, mamba1, mamba2
from mamba_dist.ops.agreement import Function

SCAN = Case("selective_scan", {"B": 1, "L": 24, "E": 8, "N": 4}, as_in_model=False)
ANY_LOAD = Plan(seconds=0.05, max_other_load=100.0)


def group_of(names: Sequence[str]) -> Group:
    return Group("a title", [Row(n, f"the {n}", 24) for n in names], {}, "default", ["right"])


def in_process(function: Function) -> JobRunner:
    """The measured job of a variant that the tool does not know."""

    def job() -> OpJob:
        return OpJob(OpSpec("cpu", SCAN), function)

    return JobRunner(job, warm_up=job, threads=torch.get_num_threads())


def gradients_times(factor: float) -> Function:
    """The right output, with every gradient off by a factor."""

    def function(inputs: Mapping[str, Tensor]) -> Tensor:
        y = our_op(SCAN, "torch")(inputs)
        return y.detach() + factor * (y - y.detach())

    return function


def train_spec(variant: str, *, layer: str = "mamba1", dtype: str = "fp32") -> TrainSpec:
    """A variant as the tool would measure it, tiny."""
    [group] = train.groups(
        "tiny",
        train.Preset(32, 2, 64, 2, (20,)),
        layer,
        optimizer=False,
        dtypes=[DTYPES[dtype]],
        allocators=["default"],
        only=(variant,),
    )
    spec = group.specs[variant]
    assert isinstance(spec, TrainSpec)
    return spec


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_variant_whose_gradients_are_wrong_gets_no_speed(factor: float) -> None:
    workers = {
        "right": in_process(our_op(SCAN, "torch")),
        "wrong": in_process(gradients_times(factor)),
    }
    found = figures(group_of(list(workers)), measure.run_in_turns(workers, ANY_LOAD))
    text = table(found)
    assert "| the right |" in text
    assert "| the wrong |" not in text
    assert re.search(r"\*\*the wrong: wrong, so it has no speed\*\*: (y|d \w+) is off by", text)
    right, wrong = records(found)
    assert "step_s" in right
    assert set(wrong) == {"group", "variant", "wrong"}


def test_a_wrong_variant_ends_the_command_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "mamba_dist.commands.bench.ChildWorker",
        lambda *_, **__: in_process(gradients_times(2.0)),
    )
    arguments = ["--shape", "1,24,8,4", "--variants", "cpu", "--allocator", "default"]
    hurry = ["--seconds", "0.05", "--max-other-load", "100"]
    assert main(["ops", "--op", "scan", *arguments, *hurry]) == 1
    assert "| ours" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layer", "variant"),
    [
        ("mamba1", "torch"),
        ("mamba1", "hf-default"),
        ("mamba1", "hf-scan"),
        ("mamba1", "mambapy"),
        ("mamba2", "torch"),
        ("mamba2", "hf"),
    ],
)
def test_every_model_computes_our_loss_and_gradients(layer: str, variant: str, dtype: str) -> None:
    if variant in ("hf-scan", "mambapy"):
        pytest.importorskip("mambapy")
    job = make_job(train_spec(variant, layer=layer, dtype=dtype))
    job.step()
    errors = job.errors()
    assert errors is not None
    assert {"the loss", "d backbone.layers.1.mixer.A_log"} <= errors.keys()
    assert 0 < max(errors.values()) < job.allowed


def test_the_optimizer_updates_the_weights_and_the_gate_starts_from_the_first_ones() -> None:
    spec = replace(train_spec("torch"), optimizer=True)
    model = build_model(spec)
    job = TrainJob(spec, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    job.step()
    after = list(model.parameters())
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
    errors = job.errors()
    assert errors is not None
    assert max(errors.values()) < job.allowed


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_the_limit_is_our_model_without_scan_and_convolution(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (mamba1, "selective_scan"),
        (mamba2, "ssd"),
        (layers, "causal_conv1d"),
    ):
        # The limit replaces them; this puts them back afterwards.
        monkeypatch.setattr(module, name, getattr(module, name))
    spec = train_spec("limit", layer=layer)
    model = limit_model(spec.config, backend="torch")
    ours = dict(build_model(replace(spec, variant="torch")).named_parameters())
    job = TrainJob(spec, model)
    job.step()
    for name, parameter in model.named_parameters():
        assert parameter.shape == ours.pop(name).shape
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        if name.endswith("_proj.weight"):
            assert parameter.grad.any(), f"{name}: its matrix products were left out"
    assert not ours
    # No position sees another one: neither a scan nor a convolution is left.
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 0] = 1
    assert torch.equal(model(tokens)[0, 1:], model(changed)[0, 1:])
    assert job.errors() is None


class Scripted:
    """A worker of fixed speed that does nothing."""

    pid = 1

    def __init__(self, step_s: float, *, dies_at_call: int | None = None) -> None:
        self.step_s = step_s
        self.calls = 0
        self.closed = False
        self._dies_at_call = dies_at_call

    def start(self) -> float:
        return self.step_s

    def steps(self, count: int) -> list[float]:
        self.calls += 1
        if self.calls == self._dies_at_call:
            raise NotMeasuredError("its process ended with -9")
        return [self.step_s] * count

    def finish(self) -> Outcome:
        return Outcome(1 << 20, None, 0.0)

    def close(self) -> None:
        self.closed = True


def measured_under(
    load: Iterator[float],
    monkeypatch: pytest.MonkeyPatch,
    workers: Mapping[str, Scripted],
    *,
    seconds: float = 0.0,
) -> Result:
    """The result where each turn sees the next of the given other loads."""
    monkeypatch.setattr(measure, "other_load_cores", lambda *_: next(load))
    return measure.run_in_turns(workers, Plan(seconds=seconds, max_other_load=0.15))


def test_rounds_with_a_busy_turn_are_dropped_and_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = {"right": Scripted(0.1), "other": Scripted(0.3)}
    # Two turns a round: the second and the fourth round are busy in one of them.
    load = iter([0, 0, 0, 0.5, 0.1, 0.1, 0.2, 0, 0, 0])
    result = measured_under(load, monkeypatch, workers)
    assert (len(result.rounds), result.dropped, result.quiet) == (3, 2, True)
    assert result.ratio("other", "right").median == pytest.approx(3)
    assert all(worker.closed for worker in workers.values())


def test_a_machine_that_never_is_quiet_ends_in_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    load = iter([0.9, 0.5, 0.7, 0.8, 0.4, 0.6, 0.3])
    result = measured_under(load, monkeypatch, {"right": Scripted(0.1)})
    # The least busy of twice as many rounds as are needed.
    assert sorted(r.other_load for r in result.rounds) == [0.4, 0.5, 0.6]
    assert not result.quiet
    text = table(figures(group_of(["right"]), result))
    assert "**The machine was not quiet**: other processes took up to 0.60 cores" in text
    assert "3 rounds dropped" in text


def test_a_slow_variant_comes_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = Scripted(0.001), Scripted(60.0)
    zeros = iter(lambda: 0.0, 1.0)
    result = measured_under(zeros, monkeypatch, {"right": quick, "slow": slow}, seconds=0.5)
    assert slow.calls == MIN_ROUNDS
    assert len(result.rounds) > MIN_ROUNDS
    assert result.ratio("slow", "right").median == pytest.approx(60_000)
    assert "the slow: 3 rounds." in table(figures(group_of(["right", "slow"]), result))


def test_a_variant_that_dies_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeros = iter(lambda: 0.0, 1.0)
    workers = {"dead": Scripted(0.1, dies_at_call=3), "right": Scripted(0.1)}
    found = figures(group_of(list(workers)), measured_under(zeros, monkeypatch, workers))
    text = table(found)
    assert "| the right |" in text
    assert "the dead: not measured: its process ended with -9" in text


def test_a_killed_worker_is_no_crash() -> None:
    worker = ChildWorker(OpSpec("torch", SCAN), threads=1, allocator="default")
    try:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(NotMeasuredError, match="its process ended with -9"):
            worker.start()
    finally:
        worker.close()


def test_a_peer_that_is_not_installed_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.setitem(sys.modules, "mambapy.mamba", None)
    monkeypatch.delitem(sys.modules, "mamba_dist.commands.bench.peers_mambapy", raising=False)
    install = re.escape("pip install mambapy")
    with pytest.raises(NotMeasuredError, match=f"mambapy.*{install}"):
        make_job(OpSpec("mambapy", SCAN))
    # transformers takes its loop instead, without a word.
    with pytest.raises(NotMeasuredError, match=f"mambapy is not installed; {install}"):
        make_job(train_spec("hf-scan"))


def test_other_load_is_what_other_processes_burn() -> None:
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        before = [cpu_times([]), cpu_times([burner.pid])]
        time.sleep(1.0)
        after = [cpu_times([]), cpu_times([burner.pid])]
    finally:
        burner.kill()
        burner.wait()
    as_other, as_own = (other_load_cores(b, a) for b, a in zip(before, after, strict=True))
    burnt = after[1].own_s - before[1].own_s
    assert burnt > 0.1
    assert as_other - as_own == pytest.approx(burnt, abs=0.1)
