"""tools/doctor.py: what it says about a machine, and that it finds a backend that is wrong."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from processes import ROOT, clean_environment
from torch import Tensor

from mamba_dist.commands import doctor
from mamba_dist.commands.bench.cases import (
    Case,
    layer_cases,
    our_op,
    random_inputs,
    within_reference_time,
)
from mamba_dist.commands.doctor import compare, compare_backends, main
from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import Function

CONV = Case("causal_conv1d", {"B": 1, "L": 40, "E": 16, "K": 4})
CPU = torch.device("cpu")
OUTPUTS = {
    "selective_scan": {"u", "delta", "A", "B", "C", "D", "z", "delta_bias"},
    "ssd": {"x", "dt", "A", "B", "C", "D", "dt_bias"},
    "causal_conv1d": {"x", "weight", "bias"},
    "linear": {"x", "weight"},
    "add_rms_norm": {"x", "residual", "weight"},
    "gated_rms_norm": {"x", "z", "weight"},
    "linear_cross_entropy": {"hidden", "weight"},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny run in bf16."""
    path = tmp_path / "run.yaml"
    content = {
        "schema_version": 2,
        "model": {"d_model": 16, "n_layers": 1, "vocab_size": 50, "d_state": 4},
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "max_steps": 4,
            "warmup_steps": 1,
        },
        "data": {"sequence_length": 70},
    }
    path.write_text(json.dumps(content))
    return path


def off_by(factor: float) -> Function:
    """The convolution with its output and gradients multiplied."""
    right = our_op(CONV, "torch")
    return lambda inputs: factor * right(inputs)


def test_every_backend_is_compared_at_the_sizes_of_a_config(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["--config", str(config), "training.micro_batch_size=1", "training.global_batch_size=4"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "native kernels are built for " in text
    assert "'auto' takes " in text
    for sizes in ("selective_scan B1 L70 E32 N4", "causal_conv1d B1 L70 E32 K4", "linear B1 L70"):
        assert f"{sizes}" in text
    for op in OUTPUTS.keys() - {"ssd", "gated_rms_norm"}:
        [block] = [b for b in text.split("\n\n") if b.startswith(f"{op} ")]
        head, backends, *rows = block.splitlines()
        assert ", bf16, tolerance " in head
        assert "torch" in backends.split()
        assert "reference" not in backends.split()
        assert {row[:18].strip() for row in rows} == {"y"} | {f"d {name}" for name in OUTPUTS[op]}
        errors = [float(cell) for row in rows for cell in row[18:].split()]
        assert len(errors) == len(rows) * len(backends.split())
        assert 0 < max(errors) < 2e-2


def test_on_request_it_lists_the_backends_and_compares_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    for backend in ("reference", "torch", "cpu", "cuda"):
        assert f"\n  {backend} " in text
    assert "'auto' takes " in text
    assert "tolerance" not in text
    assert "agrees" not in text


def test_mamba2_in_fp32_compares_ssd(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["model.layer=mamba2", "model.headdim=8", "model.chunk_size=16"]
    assert main(["--config", str(config), *changes, "training.precision=fp32"]) == 0
    text = capsys.readouterr().out
    assert "ssd B2 L70 H4 P8 N4 G1 Q16, fp32, tolerance 3e-06" in text
    # Mamba-2's convolution also has B and C, its projection z, x, B, C and dt.
    assert "causal_conv1d B2 L70 E40 K4" in text
    assert "linear B2 L70 I16 O76" in text


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.0001, True), (float("nan"), True)])
def test_an_error_out_of_tolerance_is_found(factor: float, wrong: bool) -> None:
    comparison = compare(CONV, {"right": our_op(CONV, "torch"), "odd": off_by(factor)}, CPU)
    objections = list(comparison.objections())
    assert len(objections) == (4 if wrong else 0)
    assert all(text.startswith("odd: causal_conv1d: ") for text in objections)


def test_a_backend_that_is_wrong_ends_it_with_1(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case, backend: str) -> Function:
        right = our_op(case, backend)
        odd = case.op == "causal_conv1d" and backend == "torch"
        return (lambda inputs: 1.1 * right(inputs)) if odd else right

    monkeypatch.setattr(doctor, "our_op", broken)
    assert main(["--config", str(config)]) == 1
    text = capsys.readouterr().out
    assert "WRONG: torch: causal_conv1d: d weight is off by 1.0e-01" in text
    assert "1.0e-01!" in text
    assert "WRONG: torch: selective_scan" not in text
    assert "agrees with the reference" not in text


def test_a_backend_that_fails_when_called_ends_it_with_1(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(case: Case, backend: str) -> Function:
        def fails(inputs: Mapping[str, Tensor]) -> Tensor:
            raise BackendError("the kernel library is gone")

        return fails if backend == "torch" else our_op(case, backend)

    monkeypatch.setattr(doctor, "our_op", failing)
    assert main(["--config", str(config)]) == 1
    assert "WRONG: torch: selective_scan: the kernel library is gone" in capsys.readouterr().out


def test_a_config_that_asks_for_an_absent_backend_ends_it_with_1(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "engine.ops_backend=gpu"]) == 1
    assert "WRONG: engine.ops_backend: ops backend 'gpu'" in capsys.readouterr().out


def test_an_absent_backend_is_named_with_its_install_line(config: Path, tmp_path: Path) -> None:
    # No compiler on PATH, and no library from earlier.
    environment = clean_environment() | {
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "doctor.py"), "--config", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("  cpu ")]
    assert line.split()[1] == "absent"
    assert "install a C++ compiler (Debian, Ubuntu: apt install g++" in line
    assert "'auto' takes 'torch' here" in result.stdout
    assert "selective_scan B2 L70" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no/such/file.yaml"], "error: no/such/file.yaml does not exist"),
        (["--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_override_without_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["model.d_model=64"])
    assert exit_.value.code == 2
    assert "give --config too" in capsys.readouterr().err


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_a_large_model_is_reduced_but_keeps_what_kernels_divide_by(layer: str) -> None:
    model = MambaConfig.model_validate({"layer": layer, "d_model": 4096, "n_layers": 1})
    for case in layer_cases(model, batch=64, length=8192, dtype=torch.float32):
        quick = within_reference_time(case)
        assert all(quick.sizes[x] <= size for x, size in case.sizes.items())
        assert quick.sizes["B"] == 1
        assert quick.sizes["L"] >= max(300, quick.sizes.get("Q", 0) + 1)
        changed = {x for x, size in case.sizes.items() if quick.sizes[x] != size}
        assert changed <= {"B", "L", "E", "H", "O", "V"}


def test_a_small_case_is_not_reduced() -> None:
    assert within_reference_time(CONV) == CONV
    assert {t.dtype for n, t in random_inputs(CONV).items() if n != "seq_idx"} == {torch.float32}


def test_a_head_whose_vocabulary_is_reduced_for_the_reference_is_compared() -> None:
    head = Case("linear_cross_entropy", {"B": 16, "L": 2048, "D": 2048, "V": 50280})
    comparison = compare_backends(head, ["cpu"], CPU)
    assert comparison.case.sizes["V"] < 50280
    assert not comparison.failures
    assert not list(comparison.objections())


def test_a_backend_that_breaks_is_reported_and_the_others_are_still_compared() -> None:
    def breaks(inputs: Mapping[str, Tensor]) -> Tensor:
        raise RuntimeError("out of memory")

    comparison = compare(CONV, {"broken": breaks, "right": our_op(CONV, "torch")}, CPU)
    assert comparison.failures == {"broken": "RuntimeError: out of memory"}
    assert set(comparison.errors) == {"right"}
