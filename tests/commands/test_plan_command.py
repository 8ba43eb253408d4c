import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, run_script

from mamba_dist.commands.plan import main

CONFIG = str(ROOT / "configs/1b.yaml")


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    assert main(["--config", CONFIG, "--json", *words]) == code
    return json.loads(capsys.readouterr().out)


def test_the_script_needs_neither_data_nor_torch(tmp_path: Path) -> None:
    words = ("--config", CONFIG, "--gpus", "8", "--gpu", "h100")
    result = run_script("tools/plan.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1,372,178,432 parameters" in result.stdout
    assert "286,103 steps" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("recommended, the fastest that fits: engine.zero_stage=0 ")
    program = "import sys, mamba_dist.commands.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_what_does_not_fit_as_configured_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--ranks", "1", "--memory", "23.4", code=1)
    assert found["configured"]["engine"] == "zero-0"
    assert found["configured"]["fits"] == "no"
    assert found["recommended"] is None
    found = planned(capsys, "--ranks", "1", "--memory", "60")
    assert found["configured"]["fits"] == "yes"


def test_the_recommended_plan_is_the_fastest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    roomy = planned(capsys, "--gpus", "8", "--gpu-memory", "200")["recommended"]
    assert (roomy["engine"], roomy["activation_checkpointing"]) == ("zero-0", "none")
    tight = planned(capsys, "--gpus", "8", "--gpu-memory", "24", code=0)["recommended"]
    assert tight["activation_checkpointing"] == "full"
    assert tight["bytes"]["peak"] <= 24 * 2**30


def test_time_is_work_over_the_peak_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--gpus", "8", "--gpu", "h100", "--mfu", "0.5")
    work = found["flops_per_token"] * found["tokens_per_step"]
    assert found["step_s"] == pytest.approx(work / (8 * 989e12 * 0.5))
    assert found["days"] == pytest.approx(found["steps"] * found["step_s"] / 86400)
    other = planned(capsys, "--gpus", "8", "--gpu-memory", "80", "--peak-tflops", "100")
    assert other["step_s"] == pytest.approx(work / (8 * 100e12 * other["mfu"]))
    # What is slower is not planned at the same share of the peak.
    slow = planned(capsys, "engine.zero_stage=3", "--gpus", "8")["step_s"]
    fast = planned(capsys, "engine.zero_stage=0", "--gpus", "8")["step_s"]
    assert slow == pytest.approx(2.2 * fast)


def test_epochs_have_no_days_without_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["training.max_tokens=null", "training.num_epochs=2", "--gpus", "8", "--gpu", "h200"]
    assert planned(capsys, *words)["days"] is None
    assert main(["--config", CONFIG, *words]) == 0
    assert "need the data" in capsys.readouterr().out


def test_ranks_that_cannot_share_the_batch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", CONFIG, "--gpus", "3", "--gpu", "h100"]) == 2
    assert "3 ranks cannot" in capsys.readouterr().err
