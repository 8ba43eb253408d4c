"""bench gpu-ops: the arithmetic of its figures, its peers' layouts, the tool as a user starts it.

Times need a GPU; everything else runs on a CPU, where the host's clock takes the place of events.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import fake_cuda_packages
from processes import run_script
from torch import Tensor

from mamba_dist.commands.bench import main
from mamba_dist.commands.bench.cases import LETTERS, Case, Op
from mamba_dist.commands.bench.gpu import ops as gpu_ops
from mamba_dist.commands.bench.gpu import precision as gpu_precision
from mamba_dist.commands.bench.gpu.failures import Attempts
from mamba_dist.commands.bench.gpu.ops_report import (
    Measured,
    Steps,
    precision_table,
    records,
    table,
)
from mamba_dist.commands.bench.gpu.peers import (
    PEERS,
    Inputs,
    Variant,
    expected_outputs,
    initial_state,
    least_bytes,
    model_inputs,
    variant,
)
from mamba_dist.commands.bench.gpu.precision import (
    Precision,
    Row,
    checked,
    precision,
    relative_l2,
)
from mamba_dist.ops import cuda_packages

CPU = torch.device("cpu")
SMALL: dict[Op, tuple[int, ...]] = {
    "selective_scan": (2, 40, 16, 4),
    "ssd": (2, 40, 4, 8, 16, 2, 16),
    "causal_conv1d": (2, 40, 16, 4),
    "add_rms_norm": (2, 40, 32),
    "gated_rms_norm": (2, 40, 32, 2),
    "linear_cross_entropy": (2, 40, 32, 64),
}
OURS, OTHER, PEER, SLOW_PEER = Row("gpu"), Row("gpu", True), Row("mamba-ssm"), Row("causal-conv1d")
HURRY = ("--device", "cpu", "--seconds", "0.01")


def small_case(op: Op, dtype: torch.dtype = torch.bfloat16) -> Case:
    return Case(op, dict(zip(LETTERS[op], SMALL[op], strict=True)), dtype)


def on_meta(**shapes: tuple[tuple[int, ...], torch.dtype]) -> dict[str, Tensor]:
    return {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in shapes.items()}


def steps(forward: float, both: float) -> Steps:
    return Steps(forward, both - forward, both)


def measured(**changes: Any) -> Measured:
    """Ours takes 2 s and then 3, the peer 6 and 3, another peer 8; all of it in 2 rounds."""
    rounds = (
        {OURS: steps(1.0, 2.0), PEER: steps(2.0, 6.0), SLOW_PEER: steps(2.0, 8.0)},
        {OURS: steps(1.0, 3.0), PEER: steps(2.0, 3.0), SLOW_PEER: steps(2.0, 8.0)},
    )
    rows = [OURS, PEER, SLOW_PEER]
    given = {
        "rounds": rounds,
        "least_bytes": dict.fromkeys(rows, (100, 150)),
        "warm_s": dict.fromkeys(rows, 0.1),
    }
    return Measured(small_case("selective_scan"), rows, **given | changes)


def test_the_scans_least_bytes_are_every_tensor_once() -> None:
    tokens, channels, state = 8 * 2048, 4096, 16
    wide, narrow = ((8, 2048, channels), torch.bfloat16), ((8, 2048, 1, state), torch.bfloat16)
    vector = ((channels,), torch.float32)
    inputs = on_meta(
        u=wide,
        delta=wide,
        A=((channels, state), torch.float32),
        B=narrow,
        C=narrow,
        D=vector,
        z=wide,
        delta_bias=vector,
    )
    forward, backward = least_bytes("selective_scan", inputs, on_meta(y=wide))
    parameters = 4 * (channels * state + 2 * channels)
    shared = 2 * 2 * tokens * state
    assert forward == 4 * 2 * tokens * channels + shared + parameters
    # Reads u, delta, z and dy, writes three gradients.
    assert backward == 7 * 2 * tokens * channels + 2 * shared + 2 * parameters
    with_documents = inputs | on_meta(seq_idx=((8, 2048), torch.int32))
    more = least_bytes("selective_scan", with_documents, on_meta(y=wide))
    # They are read twice and have no gradient.
    assert more == (forward + 4 * tokens, backward + 4 * tokens)


def test_the_norms_backward_reads_the_sum_and_not_its_terms() -> None:
    tokens, width = 16384, 2048
    activation, stream = ((8, 2048, width), torch.bfloat16), ((8, 2048, width), torch.float32)
    inputs = on_meta(x=activation, residual=stream, weight=((width,), torch.float32))
    forward, backward = least_bytes("add_rms_norm", inputs, on_meta(y=activation, stream=stream))
    assert forward == (2 + 4 + 2 + 4) * tokens * width + 4 * width
    # The stream, gradients of both outputs, gradients of both inputs.
    assert backward == (4 + 2 + 4 + 2 + 4) * tokens * width + 2 * 4 * width


def test_speed_is_compared_with_the_fastest_peer_within_rounds() -> None:
    found = measured()
    assert found.fastest_peer == PEER
    # 6 / 2 and 3 / 3; the ratio of the medians would be 4.5 / 2.5.
    ratio = found.speed_over(OURS, PEER, "both")
    assert (ratio.median, ratio.low, ratio.high) == (2, 1, 3)
    assert found.seconds(OURS, "both").median == 2.5


def test_the_share_of_a_copy_is_that_of_the_bytes_that_have_to_move() -> None:
    found = measured()
    # 100, 150 and 250 bytes in 1, 1.5 and 2.5 seconds, where a copy moves 400 in one.
    shares = [found.share_of_copy(OURS, p, 400.0) for p in ("forward", "backward", "both")]
    assert shares == [0.25, 0.25, 0.25]


def test_a_row_whose_times_lie_far_apart_is_flagged() -> None:
    # Ours took 1 s both times and then 1 and 2, the peer 4 and 1.
    found = measured()
    assert found.unsteady(OURS) == {"backward": 1.5, "both": 1.25}
    assert not found.unsteady(SLOW_PEER)
    text = table(found, 400.0)
    assert "- **gpu: unsteady**, backward: the median is 1.50 times the smallest" in text
    assert "**gpu: unsteady**, forward:" not in text
    assert records(found, 400.0)[0]["unsteady"] == {"backward": 1.5, "both": 1.25}
    assert found.is_right


def test_a_row_without_figures_says_why_in_the_table_and_in_the_records() -> None:
    found = measured(wrong={OURS: "y is off"}, absent={SLOW_PEER: "no package"})
    text = table(found, 400.0)
    assert "| gpu |" not in text
    assert "- **gpu: wrong, so it has no speed**: y is off" in text
    assert "- **causal-conv1d: not measured**: no package" in text
    ours, peer, slow = records(found, 400.0)
    assert (ours["wrong"], "seconds" in ours) == ("y is off", False)
    assert peer["seconds"]["both"]["median"] == 4.5
    assert slow["absent"] == "no package"
    assert not found.is_right


def test_a_difference_too_large_for_rounding_is_no_success() -> None:
    found = measured(differences={OURS: "differs a lot"}, suspects=frozenset({OURS}))
    assert "gpu: **too much for rounding**: differs a lot" in table(found, 400.0)
    assert not found.is_right
    assert measured(differences={OURS: "differs a bit"}).is_right


def test_the_precision_table_puts_ours_over_the_peers() -> None:
    errors = {OURS: {"y": 3e-3}, OTHER: {"y": 4e-3, "final_state": 1e-6}, PEER: {"y": 2e-3}}
    text = precision_table(Precision(small_case("selective_scan"), errors, {OURS: "bad"}))
    assert "|  | gpu | gpu, documents and state | mamba-ssm | gpu / mamba-ssm |" in text
    assert "| y | 3.00e-03 | 4.00e-03 | 2.00e-03 | 1.5 |" in text
    assert "| final_state |  | 1.00e-06 |  |  |" in text
    assert "- **gpu: wrong or failed**: bad" in text


def test_relative_l2_is_the_deviations_norm_over_the_truths() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_l2(truth + torch.tensor([0.0, 0.5]), truth) == pytest.approx(0.1)
    assert torch.isnan(torch.tensor(relative_l2(torch.tensor([3.0, float("nan")]), truth)))


@pytest.mark.parametrize("op", list(SMALL))
def test_inputs_are_the_ops_own_and_the_same_at_each_call(op: Op) -> None:
    case = small_case(op)
    first, second = (model_inputs(case, CPU) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert ("seq_idx" in first) == (op in {"selective_scan", "ssd", "causal_conv1d"})
    outputs = variant(case, "torch", CPU).call(first)
    for output, expected in zip(outputs, expected_outputs(op, first).values(), strict=True):
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)


def test_decays_and_steps_are_a_models() -> None:
    scan = model_inputs(Case("selective_scan", {"B": 2, "L": 300, "E": 512, "N": 16}), CPU)
    assert scan["delta_bias"].min() >= -6
    assert scan["delta_bias"].max() <= -2
    assert scan["delta"].std() == pytest.approx(0.5, rel=0.05)
    typical = scan["A"].median(0).values
    assert torch.allclose(typical, -torch.arange(1.0, 17.0), rtol=0.1)
    ssd = model_inputs(small_case("ssd"), CPU)
    assert ssd["A"].min() >= -16
    assert ssd["A"].max() <= -1


def channels_first_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: str
) -> Tensor:
    """Of causal-conv1d's other layout, which the suite's stand-in does not know."""
    assert x.is_contiguous()
    assert activation == "silu"
    padded = F.pad(x.float(), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).to(x.dtype)


def prenorm(
    x: Tensor,
    weight: Tensor,
    bias: None,
    *,
    residual: Tensor,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's `rms_norm_fn`."""
    assert prenorm
    assert residual_in_fp32
    stream = x + residual
    return F.rms_norm(stream, weight.shape, weight, eps).to(x.dtype), stream


def gated_norm(
    x: Tensor,
    weight: Tensor,
    bias: None,
    *,
    z: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """mamba-ssm's `rmsnorm_fn` of layernorm_gated."""
    assert not norm_before_gate
    gated = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group_size))
    return (F.rms_norm(gated, (group_size,), eps=eps).flatten(-2) * weight).to(x.dtype)


@pytest.mark.parametrize(("op", "peer"), [(op, peer) for op in SMALL for peer in PEERS[op]])
def test_every_peer_computes_the_op_in_its_own_layout(
    op: Op, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda_packages.install(monkeypatch)
    monkeypatch.setattr(cuda_packages, "rms_norm_fn", lambda: prenorm)
    monkeypatch.setattr(cuda_packages, "gated_rms_norm_fn", lambda: gated_norm)
    if peer == "causal-conv1d":
        monkeypatch.setattr(cuda_packages, "causal_conv1d_fn", lambda: channels_first_convolution)
    found = precision(small_case(op), [Row(peer), Row("torch")], Attempts(CPU))
    assert not found.objections
    assert found.l2[Row(peer)].keys() == found.l2[Row("torch")].keys()
    for name, error in found.l2[Row(peer)].items():
        assert error < 6e-3, name


@pytest.mark.parametrize("op", ["selective_scan", "ssd", "causal_conv1d"])
def test_rows_with_documents_are_judged_from_a_state_to_a_state(op: Op) -> None:
    found = precision(small_case(op, torch.float32), [Row("torch", True)], Attempts(CPU))
    assert not found.objections
    assert {"final_state", "d initial_state"} <= found.l2[Row("torch", True)].keys()
    assert max(found.l2[Row("torch", True)].values()) < 1e-5
    state = initial_state(small_case(op), CPU)
    assert state is not None
    assert state.dtype == torch.float32


def test_the_checked_sizes_keep_what_kernels_are_built_for() -> None:
    scan = checked(Case("selective_scan", {"B": 1, "L": 16384, "E": 4096, "N": 16}))
    assert scan.sizes == {"B": 1, "L": 320, "E": 256, "N": 16}
    sizes = {"B": 8, "L": 2048, "H": 64, "P": 64, "N": 128, "G": 8, "Q": 256}
    heads = checked(Case("ssd", sizes)).sizes
    assert (heads["H"], heads["G"], heads["P"], heads["N"]) == (8, 8, 64, 128)
    norm = checked(Case("add_rms_norm", {"B": 8, "L": 2048, "D": 2048})).sizes
    assert norm == {"B": 2, "L": 320, "D": 2048}


def test_the_tool_prints_times_and_errors_and_writes_the_same_figures(tmp_path: Path) -> None:
    case = ("--op", "linear_cross_entropy", "--shape", "2,40,32,64")
    arguments = ("gpu-ops", *case, "--variants", "cpu,F.cross_entropy", *HURRY)
    result = run_script("tools/bench.py", *arguments, "--json", "found.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"torch {torch.__version__}" in result.stdout
    full = "gpu-ops --op linear_cross_entropy --shape 2,40,32,64 --dtype bf16 --variants cpu,"
    assert f"In full: `tools/bench.py {full}F.cross_entropy --documents --dev" in result.stdout
    assert "### linear_cross_entropy B2 L40 D32 V64, bf16" in result.stdout
    assert "cpu: differs from F.cross_entropy at these sizes by at most" in result.stdout
    assert "| d weight |" in result.stdout
    written = json.loads((tmp_path / "found.json").read_text())
    ours, peer = written["records"]
    assert (ours["variant"], ours["fastest_peer"]) == ("cpu", "F.cross_entropy")
    assert f"| cpu | {ours['seconds']['forward']['median'] * 1e3:.4g} (" in result.stdout
    assert peer["speed_over_peer"]["both"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    moved, taken = ours["least_bytes"][0], ours["seconds"]["forward"]["median"]
    assert ours["share_of_copy"]["forward"] == pytest.approx(
        moved / taken / written["copy_bytes_per_s"]
    )
    # Whether products are rounded to bf16 depends on the CPU's instructions.
    assert 0 < written["precision"][0]["l2"]["cpu"]["d weight"] < 6e-3


def test_a_variant_that_cannot_run_leaves_the_others_their_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = ["--op", "causal_conv1d", "--shape", "2,40,16,4", "--variants", "torch,cuda"]
    assert main(["gpu-ops", *case, *HURRY]) == 1
    out = capsys.readouterr().out
    assert "| torch, documents |" in out
    assert "- **cuda: not measured**: ops backend 'cuda' needs device type 'cuda'" in out


def test_without_documents_there_are_no_such_rows(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--op", "causal_conv1d", "--shape", "2,40,16,4", "--variants", "torch"]
    assert main(["gpu-ops", *case, *HURRY, "--no-documents"]) == 0
    out = capsys.readouterr().out
    assert "| torch |" in out
    assert "documents" not in out.partition("###")[2]


def test_a_wrong_variant_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by_a_hundredth(case: Case, name: str, device: torch.device) -> Variant:
        right = variant(case, name, device)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            return tuple(1.01 * output for output in right.call(inputs))

        return Variant(name, call) if name == "cpu" else right

    monkeypatch.setattr(gpu_ops, "variant", off_by_a_hundredth)
    monkeypatch.setattr(gpu_precision, "variant", off_by_a_hundredth)
    case = ["--op", "add_rms_norm", "--shape", "2,40,32", "--variants", "cpu,torch"]
    assert main(["gpu-ops", *case, *HURRY]) == 1
    out = capsys.readouterr().out
    times, _, errors = out.partition("#### Errors")
    assert "\n| torch |" in times
    assert "\n| cpu |" not in times
    assert "- **cpu: wrong, so it has no speed**: " in times
    assert "- **cpu: wrong or failed**: " in errors


def test_a_crash_in_a_round_ends_that_row_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def dies_later(case: Case, name: str, device: torch.device) -> Variant:
        right = variant(case, name, device)

        def call(inputs: Inputs) -> tuple[Tensor, ...]:
            calls.append(name)
            if calls.count("cpu") > 9:
                raise RuntimeError("illegal memory access\nwith advice")
            return right.call(inputs)

        return Variant(name, call) if name == "cpu" else right

    monkeypatch.setattr(gpu_ops, "variant", dies_later)
    case = ["--op", "add_rms_norm", "--shape", "2,40,32", "--variants", "cpu,torch"]
    assert main(["gpu-ops", *case, *HURRY]) == 1
    captured = capsys.readouterr()
    assert "- **cpu: not measured**: RuntimeError: illegal memory access\n" in captured.out
    assert "| torch |" in captured.out
    assert "Traceback" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "gpus"], "--variants: gpus unknown here, expected F.cross_entropy, "),
        (["--variants", ""], "--variants: '' is not names with commas between"),
        (["--shape", "1,2,3"], "--shape goes with exactly one --op"),
        (["--op", "ssd", "--shape", "1,2,3"], "--shape: ssd has the sizes B,L,H,P,N,G,Q"),
        (
            ["--op", "gated_rms_norm", "--shape", "2,40,32,3"],
            "--shape: D32 does not fall into G3 groups",
        ),
        (["--op", "scan"], "invalid choice: 'scan'"),
        (["--json", "no/such/folder/x.json"], "folder no/such/folder does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["gpu-ops", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_what_can_be_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["gpu-ops"]) == 2
    assert "torch sees no GPU here; --device cpu" in capsys.readouterr().err
