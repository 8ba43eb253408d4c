"""tools/bench.py gpu-train: on a CPU as a user starts it, and what it makes of results."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_script

from mamba_dist.commands.bench import gpu_train, main
from mamba_dist.commands.bench.gpu_profile import (
    GAPS,
    OTHER,
    Span,
    by_category,
    category,
    profile_tables,
    summary,
)
from mamba_dist.commands.bench.gpu_step import StepResult, StepSpec, random_batch
from mamba_dist.config.load import load_config

CONFIG = """\
schema_version: 2
model: {layer: mamba1, d_model: 32, n_layers: 2, vocab_size: 61, d_state: 8}
training:
  {micro_batch_size: 2, global_batch_size: 2, max_steps: 10, warmup_steps: 1, precision: fp32}
data: {sequence_length: 16}
"""
LOSSES = (4.0, 3.9, 3.8, 3.7, 3.6)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def result(step_s: float, losses: tuple[float, ...] = LOSSES) -> StepResult:
    return StepResult("NVIDIA H100", (step_s, 2 * step_s, step_s), losses, 3 << 30, 500e12, None)


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[StepResult | str]]:
    """What the processes are made to answer by variant, one answer a round."""
    told: dict[str, list[StepResult | str]] = {}

    def answer(spec: StepSpec, *, on_cpu: bool) -> StepResult | str:
        return told[spec.variant].pop(0)

    monkeypatch.setattr(gpu_train, "_run_process", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return told


def measured(config: Path, answers: Mapping[str, object], *more: str) -> int:
    command = ["gpu-train", "--config", str(config), "--variants", ",".join(answers)]
    return main([*command, "--steps", "3", "--warmup", "2", *more])


def test_the_engine_and_a_plain_loop_are_timed_and_learn_the_same(
    config: Path, tmp_path: Path
) -> None:
    arguments = ("--variants", "plain,zero-0,zero-1", "--steps", "2", "--warmup", "3")
    where = ("--device", "cpu", "--json", "found.json")
    run = run_script(
        "tools/bench.py", "gpu-train", "--config", config, *arguments, *where, cwd=tmp_path
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "mamba1 d_model 32, 2 layers, vocabulary 61" in run.stdout
    rows = cells(run.stdout)
    assert list(rows) == ["our model, plain loop", "our model, zero-0", "our model, zero-1"]
    assert all("n/a" in row for row in rows.values()), "a CPU has no peak memory of a device"
    plain, zero_0, zero_1 = json.loads((tmp_path / "found.json").read_text())["records"]
    losses = plain["losses"][0]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True), "the batch is not being learnt"
    for record in (zero_0, zero_1):
        assert record["losses"][0] == pytest.approx(losses, rel=1e-5)
    for record in (plain, zero_0, zero_1):
        assert record["tokens_per_s"] == pytest.approx(32 / record["step_s"]["median"])
        assert 0 < record["step_s"]["low"] <= record["step_s"]["median"]


def test_figures_follow_from_times_memory_and_size(
    config: Path, answers: dict[str, list[StepResult | str]], capsys: pytest.CaptureFixture[str]
) -> None:
    # The machine is twice as slow in the second round: ratios are taken within rounds.
    answers["mamba-ssm"] = [result(1e-3), result(2e-3)]
    answers["zero-1"] = [result(2e-3), result(4e-3)]
    assert measured(config, answers, "--rounds", "2") == 0
    rows = cells(capsys.readouterr().out)
    peer, ours = rows["mamba-ssm's model, plain loop"], rows["our model, zero-1"]
    assert peer[2] == "1.000x"
    assert ours[2] == "0.500x"
    assert ours[0] == "4.00 (2.00–8.00)"
    assert ours[1] == f"{32 / 4e-3:,.0f}"
    assert ours[3] == "3.00"
    assert ours[-1] == "4.0000 3.9000 3.8000 3.7000"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("CUDA out of memory", "CUDA out of memory"),
        (result(1e-3, (4.0, float("nan"), 3.8, 3.7, 3.6)), "the loss of step 2 is nan"),
        (result(1e-3, (4.0, 4.0, 4.0, 4.0, 4.0)), "the loss of step 2 is 4.0000, and another"),
    ],
)
def test_a_variant_that_fails_gets_no_figure_and_the_others_do(
    answer: StepResult | str,
    reason: str,
    config: Path,
    answers: dict[str, list[StepResult | str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers |= {"plain": [result(1e-3)], "zero-2": [answer], "zero-3": [result(2e-3)]}
    assert measured(config, answers) == 1
    output = capsys.readouterr().out
    assert list(cells(output)) == ["our model, plain loop", "our model, zero-3"]
    assert f"**zero-2: no figures**: {reason}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "plain,zero-4"], "zero-4 unknown here, expected variants of mamba-ssm,"),
        (["--profile", "zero-9"], "zero-9 unknown here"),
        (["--variants", "plain", "--profile", "zero-1"], "zero-1 is not among --variants"),
        (["--device", "cpu", "--profile", "plain"], "--profile reads a GPU's kernels"),
        (["--device", "cpu", "--variants", "mamba-ssm"], "mamba-ssm runs on a GPU only"),
        (["--backend", "quick"], "invalid choice: 'quick'"),
        (["--steps", "0"], "0 is not a positive number"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["gpu-train", "--config", str(config), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-train", "--config", str(config)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_documents_fill_each_row(config: Path) -> None:
    spec = StepSpec("plain", load_config(config).config, 3, 16, 5, 1, 1, False)
    seq_idx = random_batch(spec, torch.device("cpu"))["seq_idx"]
    assert seq_idx.dtype == torch.int32
    assert seq_idx.shape == (3, 16)
    assert all(row.unique().tolist() == [0, 1, 2, 3, 4] for row in seq_idx)
    assert "seq_idx" not in random_batch(replace(spec, documents=None), torch.device("cpu"))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<64>>", "backward"),
        ("selective_scan_forward", "forward"),
        ("_chunk_scan_chunk_state_bwd_dx_kernel", "backward"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "matrix products"),
        ("void causal_conv1d_channellast_fwd_kernel<Causal_conv1d>", "convolution"),
        ("_layer_norm_bwd_kernel", "norm"),
        ("multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>", "clipping"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "casts"),
        ("Memcpy DtoD (Device -> Device)", "casts"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("cunn_SoftMaxForward", "cross-entropy"),
        ("something new", OTHER),
    ],
)
def test_kernels_are_told_by_name(kernel: str, expected: str) -> None:
    assert expected in category(kernel)


def test_time_that_streams_share_is_busy_once_and_the_rest_of_the_step_is_gaps() -> None:
    spans = [
        Span("nvjet_a", 0, 4_000_000),
        Span("nccl_b", 2_000_000, 6_000_000),
        Span("nvjet_a", 8_000_000, 9_000_000),
    ]
    found = summary(spans, steps=2, wall_s=10.0)
    assert found.busy_s == 7.0
    assert by_category(found) == {"matrix products": 5.0, "communication": 4.0, GAPS: 3.0}
    text = profile_tables("zero-1", found)
    assert "### zero-1: 5000.00 ms per step while profiled" in text
    assert "| matrix products | 2500.00 | 50.0 % |" in text
    assert "Kernels overlap for 1000.00 ms per step" in text
    assert "| `nvjet_a` | matrix products | 2500.00 | 1 |" in text
