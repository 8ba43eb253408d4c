"""A run over one data set, continued over a mixture and in larger steps, by real launches."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
from launching import finish, write_config
from processes import run_script

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import Progress, read_manifest
from mamba_dist.telemetry.metrics import read_metrics

LETTERS = "abcdefgh"


def progress_of(run_dir: Path, step: int) -> Progress:
    return read_manifest(checkpoint_folder(run_dir, step)).progress


def require_success(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture
def beside(tiny_data: Path, tmp_path: Path) -> Path:
    """Shards of other texts by the same tokenizer."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        text = " ".join(LETTERS[(number + k) % 8] * (1 + k % 3) for k in range(200))
        (corpus / f"{number}.txt").write_text(f"{number} {text}")
    words = ["corpus", "--tokenizer", tiny_data / "tokenizer.json", "--output", "beside"]
    require_success(run_script("data_prep/tokenize.py", *words, "--workers", "1", cwd=tmp_path))
    return tmp_path / "beside"


@pytest.mark.parametrize(
    "command",
    [
        launching.python_command,
        pytest.param(launching.torchrun_command, marks=pytest.mark.slow),
    ],
    ids=["one rank", "two ranks"],
)
def test_a_run_goes_on_over_a_mixture_and_in_larger_steps_once_that_is_accepted(
    tiny_data: Path, tmp_path: Path, beside: Path, command: Callable[..., list[str]]
) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path, tiny_data, training={"max_steps": 4})
    require_success(finish(command(config)))
    before = progress_of(run_dir, 4)

    sources = [
        {"path": str(tiny_data / "shards"), "weight": 1},
        {"path": str(beside), "weight": 3, "max_epochs": 1},
    ]
    changes = [
        f"data.sources={json.dumps(sources)}",
        "training.global_batch_size=16",
        "training.max_steps=7",
    ]
    refused = finish(command(config, *changes))
    assert refused.returncode != 0
    assert f"{beside} is new in the mixture" in refused.stderr
    assert "accept_changes=[data_mixture, global_batch_size]" in refused.stderr
    assert committed_steps(run_dir) == [4]

    accepted = "checkpoint.accept_changes=[data_mixture, global_batch_size]"
    require_success(finish(command(config, *changes, accepted)))
    after = progress_of(run_dir, 7)
    assert after.next_sample == before.next_sample + 3 * 16
    first, second = after.segments
    assert (first,) == before.segments
    assert (second.first_step, second.first_position, second.global_batch_size) == (4, 32, 16)
    taken = {source.path: source.taken for source in second.sources}
    assert taken == {str(tiny_data / "shards"): 32, str(beside): 0}
    assert [r["step"] for r in read_metrics(run_dir) if "loss" in r] == [*range(1, 8)]

    told = run_script("tools/which_docs.py", "--step", "6", "--config", run_dir, cwd=tmp_path)
    require_success(told)
    assert told.stdout.startswith("step 6: samples 48 to 63 of the run\n")
    assert told.stdout.count(f"of the run: {beside}, epoch 0") == 12
