"""tools/bench.py gpu-train: on a CPU as a user starts it, and what it makes of results."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, clean_environment

from mamba_dist.commands.bench import main
from mamba_dist.commands.bench.gpu import train as gpu_train
from mamba_dist.commands.bench.gpu.peer_model import peer_model, training_refusal
from mamba_dist.commands.bench.gpu.profile import (
    GAPS,
    OTHER,
    Span,
    by_category,
    category,
    profile_tables,
    summary,
)
from mamba_dist.commands.bench.gpu.step import StepResult, StepSpec, random_batch
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config.load import load_config

SCRIPT = ROOT / "tools/bench.py"
CONFIG = """\
schema_version: 2
model: {layer: mamba1, d_model: 32, n_layers: 2, vocab_size: 61, d_state: 8}
training:
  {micro_batch_size: 2, global_batch_size: 2, max_steps: 10, warmup_steps: 1, precision: fp32}
data: {sequence_length: 16}
"""
STAGES = """
import os, sys
from mamba_dist.commands.bench.gpu.variants import _STAGES, _zero
from mamba_dist.config.load import load_config
from mamba_dist.engine.world import start_world
config, world = load_config(sys.argv[1]).config, start_world(timeout_minutes=1)
for name, stage in _STAGES.items():
    print(name, _zero(config, stage, world)._engine.zero_optimization_stage(), flush=True)
os._exit(0)
"""
LOSSES = (4.0, 3.9, 3.8, 3.7, 3.6)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def result(
    step_s: float, losses: tuple[float, ...] = LOSSES, *, limit: float = 500e12
) -> StepResult:
    return StepResult(
        "NVIDIA H100 80GB HBM3", (step_s, 2 * step_s, step_s), losses, 3 << 30, 4 << 30, limit, None
    )


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[StepResult | str]]:
    """What the processes are made to answer by variant, one answer a round."""
    told: dict[str, list[StepResult | str]] = {}

    def answer(spec: StepSpec, *, on_cpu: bool, timeout_s: float) -> StepResult | str:
        return told[spec.variant].pop(0)

    monkeypatch.setattr(gpu_train, "_run_process", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return told


def measured(config: Path, answers: Mapping[str, object], *more: str) -> int:
    command = ["gpu-train", "--config", str(config), "--variants", ",".join(answers)]
    # One round unless `more` says otherwise: the last one counts.
    return main([*command, "--steps", "3", "--warmup", "2", "--rounds", "1", *more])


@pytest.mark.parametrize(
    "engines",
    [["zero-0"], pytest.param(["zero-0", "zero-3", "fsdp2"], marks=pytest.mark.slow)],
    ids=len,
)
def test_the_engine_and_a_plain_loop_are_timed_and_learn_the_same(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[str]
) -> None:
    arguments = ("--variants", ",".join(["plain", *engines]), "--steps", "2", "--warmup", "3")
    more = ("--accumulation-steps", "2", "--device", "cpu", "--rounds", "1", "--json", "found.json")
    # Of a launcher that had another run in mind.
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run(
        [sys.executable, SCRIPT, "gpu-train", "--config", config, *arguments, *more],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    full = "--micro-batch 2 --length 16 --accumulation-steps 2 --steps 2 --warmup 3 --rounds 1"
    assert f"In full: `tools/bench.py gpu-train --config {config} {full}" in run.stdout
    assert "mamba1 d_model 32, 2 layers, vocabulary 61" in run.stdout
    rows = cells(run.stdout)
    assert list(rows) == ["our model, plain loop", *(f"our model, {name}" for name in engines)]
    assert all("n/a" in row for row in rows.values()), "a CPU has no peak memory of a device"
    note = "- zero-3: as each of several ranks runs it, without the communication"
    assert (note in run.stdout) == ("zero-3" in engines)
    plain, *others = json.loads((tmp_path / "found.json").read_text())["records"]
    losses = plain["losses"][0]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True), "the batch is not being learnt"
    for record in others:
        assert record["losses"][0] == pytest.approx(losses, rel=1e-5)
    for record in (plain, *others):
        assert record["tokens_per_s"] == pytest.approx(64 / record["step_s"]["median"])
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
    assert peer[2] == "1.000x (1.000–1.000)"
    assert ours[2] == "0.500x (0.500–0.500)"
    assert ours[0] == "4.00 (2.00–8.00)"
    assert ours[1] == f"{32 / 4e-3:,.0f}"
    assert ours[3] == "3.00 (4.00)"
    assert ours[-1] == "4.0000 3.9000 3.8000 3.7000"


def test_a_result_is_told_as_soon_as_there_is_one(
    config: Path, answers: dict[str, list[StepResult | str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["plain"] = [result(1e-3)]
    answers["zero-0"] = ["its process ended with -9"]
    measured(config, answers)
    told = [line.strip() for line in capsys.readouterr().err.split("\n")]
    assert told[told.index("[round 1/1] plain") + 1].startswith("1.00 ms per step")
    assert told[told.index("[round 1/1] zero-0") + 1] == "its process ended with -9"


def test_ratios_show_how_far_rounds_lie_apart(
    config: Path, answers: dict[str, list[StepResult | str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["plain"] = [result(1e-3), result(1e-3), result(1e-3)]
    answers["zero-0"] = [result(1e-3), result(2e-3), result(4e-3)]
    assert measured(config, answers, "--rounds", "3") == 0
    rows = cells(capsys.readouterr().out)
    assert rows["our model, zero-0"][2] == "0.500x (0.250–1.000)"


def test_all_variants_are_measured_by_one_matmul_limit(
    config: Path,
    tmp_path: Path,
    answers: dict[str, list[StepResult | str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The device was slow before the second one: that makes it no better.
    answers["plain"] = [result(1e-3, limit=600e12)]
    answers["zero-0"] = [result(1e-3, limit=300e12)]
    json_file = tmp_path / "found.json"
    assert measured(config, answers, "--json", str(json_file)) == 0
    plain, zero_0 = json.loads(json_file.read_text())["records"]
    assert plain["share_of_matmul_limit"] == zero_0["share_of_matmul_limit"]
    assert plain["share_of_matmul_limit"] * 600e12 == pytest.approx(plain["mfu_6n"] * 989e12)
    assert zero_0["matmul_flops_per_s"] == 300e12
    assert "ran at 300 to 600, of which the largest is" in capsys.readouterr().out


@pytest.mark.parametrize(("off", "code"), [(5, 0), (-5, 0), (20, 1)])
def test_the_peers_losses_may_lie_ten_times_as_far_from_ours_as_ours_from_each_other(
    off: int, code: int, config: Path, answers: dict[str, list[StepResult | str]]
) -> None:
    others = tuple(loss * (1 + off * 1e-4) for loss in LOSSES)
    answers["plain"] = [result(1e-3)]
    answers["mamba-ssm"] = [result(1e-3, others)]
    assert measured(config, answers) == code
    answers.clear()
    answers |= {"plain": [result(1e-3)], "zero-0": [result(1e-3, others)]}
    assert measured(config, answers) == 1


def test_a_variant_that_has_failed_is_not_tried_again(
    config: Path, answers: dict[str, list[StepResult | str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers |= {"plain": [result(1e-3)] * 3, "zero-0": [result(1e-3), "out of memory"]}
    assert measured(config, answers, "--rounds", "3") == 1
    captured = capsys.readouterr()
    assert "**zero-0: no figures**: out of memory" in captured.out
    assert captured.err.count("zero-0") == 2


def test_every_label_is_the_stage_that_runs(config: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", STAGES, str(config)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("zero-")]
    assert lines == [f"zero-{stage} {stage}" for stage in range(4)], found.stderr


def test_a_process_that_does_not_end_is_killed_and_the_reason_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho compiling; exec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu_train, "sys", SimpleNamespace(executable=str(slow)))
    spec = StepSpec("zero-0", load_config(config).config, 1, 16, None, 1, 1, False)
    assert gpu_train._run_process(spec, on_cpu=True, timeout_s=1) == (
        "it did not end within --timeout 1 seconds and was killed / compiling"
    )


def default_variants(config: Path, *more: str) -> list[str]:
    parser = argparse.ArgumentParser()
    gpu_train.add_arguments(parser)
    return list(gpu_train._specs(parser.parse_args(["--config", str(config), *more])))


def test_the_default_variants_are_those_that_can_run(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default_variants(config) == ["mamba-ssm", "plain", "zero-0"]
    assert not capsys.readouterr().err
    assert default_variants(config, "--device", "cpu") == ["plain", "zero-0"]
    assert default_variants(config, "--activation-checkpointing", "full") == ["plain", "zero-0"]
    reason = "mamba-ssm is left out: mamba-ssm's model does not checkpoint its blocks"
    assert reason in capsys.readouterr().err
    assert default_variants(config, "--profile", "zero-2") == ["zero-2"]


def test_the_peer_refuses_what_it_cannot_do(config: Path) -> None:
    run = load_config(config).config
    assert training_refusal(run) is None
    model = run.model.model_copy(update={"norm_eps": 1e-6})
    with pytest.raises(NotMeasuredError, match="a fixed norm_eps of 1e-05, not 1e-06"):
        peer_model(model, device=torch.device("cpu"), dtype=torch.float32)


def test_the_note_about_the_peers_documents_is_for_runs_with_the_peer(
    config: Path, answers: dict[str, list[StepResult | str]], capsys: pytest.CaptureFixture[str]
) -> None:
    note = "mamba-ssm has no documents"
    answers["plain"] = [result(1e-3)]
    assert measured(config, answers, "--documents", "3") == 0
    assert note not in capsys.readouterr().out
    answers |= {"plain": [result(1e-3)], "mamba-ssm": [result(1e-3)]}
    assert measured(config, answers, "--documents", "3") == 0
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--documents", "17"], ["--length", "4", "--documents", "5"]])
def test_more_documents_than_tokens_are_refused(
    more: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu-train", "--config", str(config), "--device", "cpu", *more]) == 2
    length = "16" if len(more) == 2 else "4"
    assert f"{more[-1]} do not fit into a row of {length} tokens" in capsys.readouterr().err


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
        (["--variants", "plain,"], "'plain,' is not names with commas between"),
        (["--timeout", "0"], "0 is not a positive number"),
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
