"""What the GPU benchmarks say when something fails, and when it takes the device with it."""

import pytest
import torch
from torch import Tensor

from mamba_dist.commands.bench import main
from mamba_dist.commands.bench.cases import Case
from mamba_dist.commands.bench.gpu import ops as gpu_ops
from mamba_dist.commands.bench.gpu import precision as gpu_precision
from mamba_dist.commands.bench.gpu.failures import Attempts, Failure, reason_of
from mamba_dist.commands.bench.gpu.peers import Inputs, Variant, variant
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.errors import BackendError

HURRY = ("--device", "cpu", "--seconds", "0.01")


@pytest.mark.parametrize("error", [NotMeasuredError("no such shape"), BackendError("no package")])
def test_an_expected_refusal_is_told_without_a_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason_of(error) == str(error)
    assert capsys.readouterr().err == ""


def test_a_crash_is_told_in_a_line_and_shows_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dies() -> None:
        raise RuntimeError("out of memory\nwith advice")

    attempts = Attempts(torch.device("cpu"))
    assert attempts.told("graph", dies) == Failure("RuntimeError: out of memory")
    assert "in dies" in capsys.readouterr().err
    assert attempts.told("eager", lambda: 7) == 7
    assert attempts.lost is None


def test_an_error_that_shows_at_the_next_wait_is_the_calls_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pending: list[str] = []

    def wait(_: Attempts) -> None:
        if pending:
            raise RuntimeError(pending.pop())

    monkeypatch.setattr(Attempts, "_wait", wait)
    attempts = Attempts(torch.device("cpu"))
    late = attempts.told("graph", lambda: pending.append("CUDA error: misaligned address"))
    assert late == Failure("RuntimeError: CUDA error: misaligned address")
    assert attempts.told("eager", lambda: 7) == 7


class LosesTheDevice:
    """A device that the variant cpu makes unusable at the given call, as CUDA does it."""

    def __init__(self, at_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = at_call
        self.calls: list[str] = []
        monkeypatch.setattr(gpu_ops, "variant", self._variant)
        monkeypatch.setattr(gpu_precision, "variant", self._variant)
        monkeypatch.setattr(Attempts, "_wait", lambda _: self._require_device())

    def _require_device(self) -> None:
        if self._left <= 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _variant(self, case: Case, name: str, device: torch.device) -> Variant:
        right = variant(case, name, device)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            self._require_device()
            self.calls.append(name)
            self._left -= name == "cpu"
            return right.call(inputs)

        return Variant(name, call)


def test_a_variant_that_takes_the_device_with_it_is_named_as_the_reason_of_those_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = LosesTheDevice(1, monkeypatch)
    ops = ["--op", "add_rms_norm", "--op", "gated_rms_norm", "--variants", "cpu,torch"]
    shapes = {"add_rms_norm": ((2, 40, 32),), "gated_rms_norm": ((2, 40, 32, 2),)}
    monkeypatch.setattr(gpu_ops, "_SHAPES", shapes)
    assert main(["gpu-ops", *ops, *HURRY]) == 1
    out = capsys.readouterr().out
    culprit = "cpu in add_rms_norm B2 L40 D32 has left the device unusable to this process"
    assert out.count(f"- **torch: not measured**: {culprit} (RuntimeError: CUDA error") == 2
    assert f"- **cpu: not measured**: {culprit}" in out.partition("### gated_rms_norm")[2]
    assert "torch" not in device.calls


@pytest.mark.parametrize("order", ["torch,cpu", "cpu,torch"])
def test_what_was_measured_before_the_device_was_lost_stands(
    order: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Six calls warm it up and one is judged; each round has two.
    LosesTheDevice(7 + 2 * 2 + 1, monkeypatch)
    case = ["--op", "add_rms_norm", "--shape", "2,40,32", "--variants", order]
    assert main(["gpu-ops", *case, *HURRY]) == 1
    out = capsys.readouterr().out
    assert "\n| torch |" in out
    assert "- **cpu: not measured**: RuntimeError: CUDA error" in out
    assert "Medians (smallest to largest) of 3 rounds" in out
