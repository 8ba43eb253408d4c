"""tools/bench.py as a user starts it: tables, JSON, and arguments that are refused."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_script

from mamba_dist.commands import bench
from mamba_dist.commands.bench import main

SCRIPT = "tools/bench.py"
# The machine that runs the tests may be busy: these are tests of the tool, not of a speed.
HURRY = ("--seconds", "0.2", "--max-other-load", "100", "--threads", "1")
TINY_MODEL = ("--d-model", "32", "--layers", "1", "--vocab", "64", "--length", "16")


def cells(markdown: str) -> dict[str, dict[str, str]]:
    """The table's cells by variant and column."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = lines
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def median(cell: str) -> float:
    return float(cell.split()[0].rstrip("x").replace(",", ""))


def test_ops_prints_a_table_per_allocator_and_writes_the_same_figures(tmp_path: Path) -> None:
    case = ("--op", "conv", "--shape", "1,40,16,4", "--variants", "cpu,nn.Conv1d")
    result = run_script(SCRIPT, "ops", *case, *HURRY, "--json", "found.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    heading, default, tuned = result.stdout.split("### ")
    assert f"torch {torch.__version__}" in heading
    assert "1 threads" in heading
    assert "`tools/bench.py ops --op conv" in heading
    assert default.startswith("causal_conv1d B1 L40 E16 K4, fp32, default malloc")
    assert tuned.startswith("causal_conv1d B1 L40 E16 K4, fp32, tuned malloc")
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["threads"] == 1
    for part, text in enumerate((default, tuned)):
        shown = cells(text)
        assert list(shown) == ["ours, backend cpu", "torch's Conv1d and silu"]
        written = document["records"][2 * part : 2 * part + 2]
        assert [r["variant"] for r in written] == ["cpu", "nn.Conv1d"]
        for row, record in zip(shown.values(), written, strict=True):
            assert median(row["ms per step"]) == pytest.approx(
                record["step_s"]["median"] * 1e3, rel=1e-3
            )
            assert record["step_s"]["low"] <= record["step_s"]["median"]
            assert record["step_s"]["median"] <= record["step_s"]["high"]
            assert max(record["errors"].values()) < 1e-5
            over = record["time_per_token_over_baseline"]["median"]
            assert median(row["time per token over ours, backend cpu"]) == pytest.approx(
                over, abs=0.006
            )
        assert written[0]["time_per_token_over_baseline"]["median"] == 1


def test_train_compares_with_the_limit_and_with_hugging_face(tmp_path: Path) -> None:
    variants = ("--variants", "torch,limit,hf-default", "--allocator", "tuned")
    result = run_script(SCRIPT, "train", *TINY_MODEL, *variants, *HURRY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mamba1 d_model 32, 1 layers, vocabulary 64, B2 L16, fp32, tuned" in result.stdout
    shown = cells(result.stdout)
    ours, limit, theirs = shown.values()
    assert list(shown)[2] == "Hugging Face, default path"
    assert limit["share of the limit's speed"].startswith("100.0 % (100.0 %–100.0 %)")
    assert limit["over the limit's"] == "1.00x"
    assert median(ours["share of the limit's speed"]) < 100
    assert median(theirs["time per token over ours, backend torch"]) > 0
    assert "rounds, ratios within rounds; 0 rounds dropped" in result.stdout


def test_several_lengths_are_compared_per_token(tmp_path: Path) -> None:
    lengths = ("--preset", "length", *TINY_MODEL, "--length", "16,32", "--variants", "torch")
    arguments = ("train", *lengths, "--allocator", "tuned", "--json", "found.json", *HURRY)
    result = run_script(SCRIPT, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(cells(result.stdout)) == ["ours, backend torch, L16", "ours, backend torch, L32"]
    short, long = json.loads((tmp_path / "found.json").read_text())["records"]
    # Ratios are taken within rounds, so only about the ratio of the medians.
    expected = long["step_s"]["median"] / 32 / (short["step_s"]["median"] / 16)
    assert long["time_per_token_over_baseline"]["median"] == pytest.approx(expected, rel=0.5)
    assert "share_of_limit" not in long


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--variants", "mambapi"], "--variants: mambapi unknown here, expected cpu,"),
        (["train", "--layer", "mamba2", "--variants", "mambapy"], "--variants: mambapy unknown"),
        (["ops", "--shape", "1,2,3"], "--shape goes with exactly one --op"),
        (["ops", "--op", "scan", "--shape", "1,2,3"], "--shape: scan has the sizes B,L,E,N"),
        (["ops", "--op", "scan", "--shape", "1,0,3,4"], "0 is not a positive number"),
        (["ops", "--seconds", "0"], "0 is not a positive number"),
        (["ops", "--op", "scan", "--shape", "1,x,3,4"], "1,x,3,4 is not numbers with commas"),
        (["train", "--json", "no/such/folder/x.json"], "folder no/such/folder does not exist"),
        (["train", "--json", "/"], "--json: / is a folder"),
        (["train", "--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_is_refused_with_its_field(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--d-model", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: the model to measure: model.d_model: found 3, expected")


def test_a_table_without_figures_is_no_success(tmp_path: Path) -> None:
    # 3 heads in 2 groups.
    case = ("--op", "ssd", "--shape", "1,8,3,4,4,2,3", "--variants", "cpu", "--allocator", "tuned")
    result = run_script(SCRIPT, "ops", *case, *HURRY, cwd=tmp_path)
    assert result.returncode == 1, result.stdout
    assert "not measured: " in result.stdout


def test_an_interrupted_run_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = bench._measured
    calls = []

    def stop_at_the_second(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "_measured", stop_at_the_second)
    case = ["ops", "--op", "conv", "--shape", "1,40,16,4", "--variants", "cpu"]
    assert main([*case, *HURRY, "--json", str(tmp_path / "found.json")]) == 130
    assert len(json.loads((tmp_path / "found.json").read_text())["records"]) == 1
