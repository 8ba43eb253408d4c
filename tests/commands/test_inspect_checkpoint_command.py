"""tools/inspect_checkpoint.py on checkpoints of several ranks: shown, verified and compared."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from written_checkpoint import run_config, state_of, write_as_ranks

from mamba_dist.checkpoint.layout import MANIFEST, staging_folder
from mamba_dist.commands.inspect_checkpoint import main
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.base import STATE_KINDS

Asked = Callable[..., str]


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    def ask(*words: object, code: int = 0) -> str:
        """What a command line printed: to stderr too, if it is to end with another code than 0."""
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        return captured.out + (captured.err if code else "")

    return ask


def mixed_order() -> RunOrder:
    content = SourceContent(1, 1, 1, 1, 1, "0", 9, 0, 0.9, 0.1)
    code, text = (
        SourceRecord(f"data/{name}", name[0] * 64, weight, None, 10, content)
        for name, weight in (("code", 1.0), ("text", 3.0))
    )
    begun = RunOrder([first_segment([code], global_batch_size=4)], seed=0, shuffle=True)
    return begun.changed(step=2, sources=[code, text], global_batch_size=8)


def written(run_dir: Path, step: int = 5, size: int = 2, **options: Any) -> Path:
    order = mixed_order()
    return write_as_ranks(
        run_dir,
        step,
        size,
        segments=order.segments,
        next_sample=order.positions(step).start,
        **options,
    )


def test_a_run_folder_shows_its_newest_checkpoint(tmp_path: Path, asked: Asked) -> None:
    written(tmp_path, 4)
    folder = written(tmp_path, saved_at=1767225600.0, val_loss=3.25)
    report = tmp_path / "report.json"
    printed = asked(tmp_path, "--json", report)
    assert printed == asked(folder)
    for line in (
        str(folder),
        r"  step +5  optimizer steps, 4 of them updates",
        r"  tokens +495  trained on",
        r"  samples +32  read, 4 a step",
        r"  saved +2026-01-01 00:00  by the clock of rank 0, in UTC",
        r"  validation +3\.250000  nats per token",
        r"  written by  test on 2 ranks",
        rf"  versions    torch {re.escape(torch.__version__)}",
        r"  model       mamba1, 1 layer, d_model 16, d_inner 32, d_state 16, .*",
        r"  parameters +23  in 3 tensors",
        r"  tokenizer   sha256 0, EOS e",
        r"data, fingerprint f",
        r"  step 1 to 2, sample 0 on: batches of 4, 100 % data/code \(cccccccccccc\)",
        r"  step 3 on, sample 8 on: batches of 8, 25 % data/code \(c+\), 75 % data/text \(t+\)",
        r"  read of data/code \(c+\): 14 samples, 40 % of epoch 1",
        r"  read of data/text \(t+\): 18 samples, 80 % of epoch 1",
        *(
            rf"  +{path.stat().st_size:,}  bytes  {re.escape(path.name)}"
            for path in folder.iterdir()
        ),
    ):
        assert re.search(f"^{line}$", printed, re.M), line
    found = json.loads(report.read_text())
    assert found["folder"] == str(folder)
    assert (found["world_size"], found["parameter_count"]) == (2, 23)
    assert found["progress"]["trained_tokens"] == 495
    assert [cursor["samples_read"] for cursor in found["cursors"]] == [14, 18]
    assert asked(tmp_path, "--step", 4).startswith(f"{folder.with_name('step-00000004')}\n")


def test_the_table_of_parameters_joins_all_ranks(tmp_path: Path, asked: Asked) -> None:
    state = state_of(5)
    state["b"]["exp_avg"][3] = math.nan
    folder = written(tmp_path, size=3, state=state, flat=True)
    report = tmp_path / "report.json"
    printed = asked(folder, "--parameters", "--json", report)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[-3:]}
    norms = [f"{float(state['a'][kind].norm()):.4e}" for kind in STATE_KINDS]
    assert rows["a"] == ["3x5", "float32", *norms, "0"]
    assert rows["b"][3:] == ["nan", f"{float(state['b']['exp_avg_sq'].norm()):.4e}", "1"]
    stored = {row["name"]: row for row in json.loads(report.read_text())["parameters"]}
    assert stored["b"]["norms"]["exp_avg"] is None
    assert stored["b"]["non_finite"] == {"master": 0, "exp_avg": 1, "exp_avg_sq": 0}


@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_a_flipped_byte_in_any_file_is_found_and_that_file_named(
    tmp_path: Path, asked: Asked, where: float
) -> None:
    folder = written(tmp_path, size=3)
    report = tmp_path / "report.json"
    assert "whole: 3 files and manifest.json" in asked(folder, "--verify")
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 4
    for name in names:
        original = (folder / name).read_bytes()
        flipped = bytearray(original)
        flipped[int(where * len(flipped))] ^= 0x10
        (folder / name).write_bytes(flipped)
        printed = asked(tmp_path, "--verify", "--json", report, code=1)
        (folder / name).write_bytes(original)
        assert f"{folder / name}" in printed
        assert [damage["file"] for damage in json.loads(report.read_text())["damaged"]] == [name]


def test_each_of_several_damaged_files_is_named(tmp_path: Path, asked: Asked) -> None:
    folder = written(tmp_path, size=3)
    os.truncate(folder / "rank-00000.safetensors", 10)
    (folder / "rank-00002.safetensors").unlink()
    kept = folder.rename(folder.with_suffix(".damaged"))
    printed = asked(kept, "--verify", "--parameters", code=1)
    assert f"{kept}/rank-00000.safetensors has 10 bytes" in printed
    assert f"{kept}/rank-00002.safetensors cannot be read" in printed
    assert "2 faults in 2 files" in printed
    (kept / MANIFEST).unlink()
    assert f"{kept / MANIFEST}: cannot be read" in asked(kept, "--verify", code=1)


def test_equal_state_is_equal_across_ranks_and_stages(tmp_path: Path, asked: Asked) -> None:
    config = run_config()
    engine = config.engine.model_copy(update={"zero_stage": 3})
    first = written(tmp_path / "first", size=1)
    second = written(
        tmp_path / "second", size=4, flat=True, config=config.model_copy(update={"engine": engine})
    )
    printed = asked(first, tmp_path / "second")
    assert "  world_size: 1 -> 4\n" in printed
    assert f"  config.engine.zero_stage: {config.engine.zero_stage} -> 3\n" in printed
    assert "\nequal: 3 parameters" in printed
    assert asked(first, second) == printed


def test_one_changed_element_and_other_progress_make_two_different(
    tmp_path: Path, asked: Asked
) -> None:
    state = state_of(5)
    state["a"]["exp_avg"][2, 4] += 0.25
    first = written(tmp_path / "first", size=2)
    second = written(tmp_path / "second", size=3, flat=True, state=state)
    report = tmp_path / "report.json"
    printed = asked(first, second, "--json", report, code=1)
    assert re.search(r"^a +exp_avg +2\.500e-01 +\S+  1 of 15$", printed, re.M)
    assert "different: 1 of 3 parameters\n" in printed
    found = json.loads(report.read_text())
    assert not found["same_state"]
    assert [(state["name"], state["differing"]) for state in found["states"]] == [("a", 1)]
    state["a"]["exp_avg"][0, 0] = math.inf
    worse = written(tmp_path / "worse", state=state)
    asked(first, worse, "--json", report, code=1)
    (found,) = json.loads(report.read_text(), parse_constant=pytest.fail)["states"]
    assert (found["differing"], found["max_difference"]) == (2, None)
    later = written(tmp_path / "later", step=6, state=state_of(5))
    printed = asked(first, later, code=1)
    assert "  step: 5 -> 6\n" in printed
    assert "different: step, next_sample, trained_tokens, adam_steps\n" in printed


def test_bad_input_is_one_clear_error(tmp_path: Path, asked: Asked) -> None:
    folder = written(tmp_path / "run", size=2)
    (tmp_path / "empty").mkdir()
    staging = written(tmp_path / "cut", 3).rename(staging_folder(tmp_path / "cut", 3))
    truncated = written(tmp_path / "truncated")
    os.truncate(truncated / MANIFEST, 100)
    missing = written(tmp_path / "missing")
    (missing / "rank-00001.safetensors").unlink()
    other = state_of(5)
    del other["b"]
    for words, error in (
        ([tmp_path / "nowhere"], "nowhere: does not exist; name a run folder"),
        ([folder / MANIFEST], "is a file; name a run folder"),
        ([tmp_path / "empty"], "manifest.json: cannot be read"),
        ([tmp_path / "empty", "--verify"], "manifest.json: cannot be read"),
        ([staging], "an interrupted save"),
        ([tmp_path / "cut"], "only step-00000003.partial"),
        ([truncated], "manifest.json: is not JSON"),
        ([missing, "--parameters"], "rank-00001.safetensors cannot be read"),
        ([folder, missing], "rank-00001.safetensors cannot be read"),
        ([tmp_path / "run", "--step", 4], "no checkpoint of step 4; expected one of 5"),
        ([folder, written(tmp_path / "o", state=other)], "parameter b has shape [7] and none"),
        ([folder, "--json", tmp_path / "nowhere/f.json"], "f.json cannot be written"),
    ):
        printed = asked(*words, code=2)
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert error in line
    for words in ([folder] * 3, [folder, folder, "--verify"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in words])
