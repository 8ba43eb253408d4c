"""Whole runs on two gloo ranks: same run by every launcher, bit-exact after a kill, clean stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import launching
import pytest
from launching import begin, finish, ranks_of, wait_until, write_config
from processes import run_script

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.commands.plan_packing import main as plan_packing
from mamba_dist.commands.run_status import status_of
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import Packing
from mamba_dist.data.batch import IGNORED_LABEL, SampleId, pack
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.samples import training_samples
from mamba_dist.telemetry.merged_log import describe, merged
from mamba_dist.telemetry.metrics import read_metrics
from mamba_dist.train.plan import describe_plan
from mamba_dist.train.stop import EXIT_STOPPED

# A rank needs a few seconds to import torch and DeepSpeed; the tests below wait for steps.
START_S = 90
FSDP2 = {"kind": "fsdp2", "zero_stage": None}


def state_hashes(run_dir: Path, step: int) -> set[tuple[object, ...]]:
    """Identity of parameters and moments, bit for bit."""
    fragments = read_manifest(checkpoint_folder(run_dir, step)).fragments
    return {
        (f.name, f.start, f.numel, f.master_sha256, f.exp_avg_sha256, f.exp_avg_sq_sha256)
        for f in fragments
    }


def recorded(run_dir: Path, name: str) -> dict[float | None, float | None]:
    """A metric by step, as the last start that reached it found it."""
    return {r["step"]: r[name] for r in read_metrics(run_dir) if name in r}


def losses(run_dir: Path) -> dict[float | None, float | None]:
    return recorded(run_dir, "loss")


def require_success(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    "engine",
    [
        {"zero_stage": 0},
        {"zero_stage": 3},
        *(
            pytest.param(engine, marks=pytest.mark.slow)
            for engine in ({"zero_stage": 1}, {"zero_stage": 2}, FSDP2)
        ),
    ],
)
def test_five_steps_kill_nine_and_five_more_are_ten_steps_bit_for_bit(
    tiny_data: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    whole = write_config(tmp_path / "whole", tiny_data, engine=engine)
    require_success(finish(launching.ranks_command(whole)))

    # Slow enough after step 5 that the kill comes before step 10: validation at every step.
    broken = write_config(
        tmp_path / "broken",
        tiny_data,
        engine=engine,
        training={"eval_steps": 1, "eval_sequences": 64, "run_dir": str(tmp_path / "broken/run")},
    )
    run_dir = tmp_path / "broken/run"
    process = begin(launching.ranks_command(broken), tmp_path / "log")
    wait_until(lambda: committed_steps(run_dir) == [5], timeout_s=START_S, what="a checkpoint")
    launching.kill_all(broken)
    process.wait(timeout=60)
    assert committed_steps(run_dir) == [5]
    killed = status_of(run_dir)
    assert (killed.state, killed.total_steps, killed.starts[0].reason) == ("killed", 10, None)
    assert [(fault.ranks, fault.text) for fault in killed.faults] == [((0, 1), None)]

    result = finish(launching.ranks_command(broken))
    require_success(result)
    assert "resumed after step 5" in result.stderr
    assert state_hashes(run_dir, 10) == state_hashes(tmp_path / "whole/run", 10)
    assert losses(run_dir) == losses(tmp_path / "whole/run")
    progress = read_manifest(checkpoint_folder(run_dir, 10)).progress
    assert progress == read_manifest(checkpoint_folder(tmp_path / "whole/run", 10)).progress
    ended = status_of(run_dir)
    assert [(s.first_step, s.reason, s.last_step) for s in ended.starts] == [
        (0, None, None),
        (5, "finished", 10),
    ]
    log = list(describe(merged(run_dir)))
    assert sum("resumed after step 5" in line for line in log) == 1
    assert log[-1].endswith("[ranks 0-1] END exit code 0 after step 10, finished")


def test_deepspeed_torchrun_and_python_give_the_same_run(tiny_data: Path, tmp_path: Path) -> None:
    runs, said = {}, {}
    for name, command in {
        "deepspeed": launching.deepspeed_command,
        "torchrun": launching.torchrun_command,
        "python": launching.python_command,
    }.items():
        config = write_config(tmp_path / name, tiny_data)
        result = finish(command(config))
        require_success(result)
        runs[name], said[name] = tmp_path / name / "run", result.stderr
    # Only the last of them runs on one rank.
    assert [name for name, text in said.items() if "running stage 0" in text] == ["python"]
    engines = {n: read_manifest(checkpoint_folder(run, 10)).engine for n, run in runs.items()}
    assert engines == {"deepspeed": "zero-1", "torchrun": "zero-1", "python": "zero-0"}
    assert state_hashes(runs["deepspeed"], 10) == state_hashes(runs["torchrun"], 10)
    two_ranks, one_rank = losses(runs["deepspeed"]), losses(runs["python"])
    assert two_ranks.keys() == one_rank.keys() == set(range(1, 11))
    for step, loss in one_rank.items():
        assert two_ranks[step] == pytest.approx(loss, rel=1e-5)
    assert losses(runs["python"])[10] < losses(runs["python"])[1] - 0.5
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer*"))


def test_a_run_under_fsdp2_goes_on_under_zero_on_another_number_of_ranks(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_data, engine=FSDP2, training={"precision": "bf16", "deterministic": True}
    )
    run_dir = tmp_path / "run"
    first = finish(launching.deepspeed_command(config))
    require_success(first)
    assert "FSDP2 shards each layer over 2 ranks" in first.stderr
    assert read_manifest(checkpoint_folder(run_dir, 10)).engine == "fsdp2"
    wanted = [recorded(run_dir, name) for name in ("loss", "grad_norm", "val_loss")]
    shutil.rmtree(checkpoint_folder(run_dir, 10))
    second = finish(launching.python_command(config, "engine.kind=zero"))
    require_success(second)
    assert "resumed after step 5" in second.stderr
    assert "engine.kind was 'fsdp2', is 'zero'" in second.stderr
    assert read_manifest(checkpoint_folder(run_dir, 10)).engine == "zero-0"
    found = [recorded(run_dir, name) for name in ("loss", "grad_norm", "val_loss")]
    assert [len(records) for records in found] == [10, 10, 2]
    # bf16 products of other rows round to other neighbours.
    for before, after in zip(wanted, found, strict=True):
        assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_four_and_one_rank_with_mixed_engines_are_one_run(
    tiny_data: Path, tmp_path: Path
) -> None:
    training = {"max_steps": 16, "eval_steps": None, "lr_schedule": "constant"}
    whole = write_config(tmp_path / "whole", tiny_data, training=training)
    require_success(finish(launching.python_command(whole)))
    mixed = write_config(
        tmp_path / "mixed",
        tiny_data,
        training=training,
        checkpoint={"save_steps": 4, "keep_last": 4},
    )
    run_dir = tmp_path / "mixed/run"
    legs = (
        (launching.torchrun_command, 1, "fsdp2"),
        (launching.deepspeed_command, 2, 3),
        (launching.torchrun_command, 4, "fsdp2"),
        (launching.torchrun_command, 1, 1),
    )
    for leg, (command, ranks, kind) in enumerate(legs):
        engine = (
            ["engine.kind=fsdp2", "engine.zero_stage=null"]
            if kind == "fsdp2"
            else [f"engine.zero_stage={kind}"]
        )
        end = f"training.max_steps={4 * (leg + 1)}"
        require_success(finish(command(mixed, end, *engine, ranks=ranks)))
    engines = [read_manifest(checkpoint_folder(run_dir, step)).engine for step in (4, 8, 12, 16)]
    assert engines == ["fsdp2", "zero-3", "fsdp2", "zero-0"]
    assert losses(run_dir).keys() == set(range(1, 17))
    assert list(losses(run_dir).values()) == pytest.approx(
        list(losses(tmp_path / "whole/run").values()), rel=1e-5
    )


def test_deterministic_algorithms_are_all_that_a_run_needs(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    code = (
        "import sys, torch\n"
        "from mamba_dist.commands.train import main\n"
        "sys.argv[1:] = ['--config', sys.argv[1], 'training.deterministic=true']\n"
        "status = main()\n"
        "print(status, torch.are_deterministic_algorithms_enabled())\n"
    )
    result = finish([sys.executable, "-c", code, str(config)])
    require_success(result)
    assert result.stdout.splitlines()[-1] == "0 True"
    assert losses(tmp_path / "run").keys() == set(range(1, 11))


def test_a_dry_run_tells_the_stage_that_would_run_and_what_it_takes(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    plans = {}
    for ranks in (1, 2):
        words = ("--config", config, "--dry-run", "--ranks", str(ranks), "engine.zero_stage=3")
        result = run_script("launch/train.py", *words, cwd=tmp_path)
        require_success(result)
        plans[ranks] = result.stdout
    assert "ZeRO 0 (one rank shares nothing: not 3) on 1 ranks" in plans[1]
    assert "ZeRO 3 on 2 ranks" in plans[2]
    assert "training sequences of 128 tokens, packing concat\n" in plans[2]
    assert not (tmp_path / "run").exists()


def test_the_plan_under_fsdp2_tells_what_a_rank_keeps(tiny_data: Path, tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, tiny_data, engine=FSDP2)).config
    assert "FSDP2 on 2 ranks, fp32" in describe_plan(config, world_size=2)
    kept = config.engine.model_copy(update={"reshard_after_forward": False})
    plan = describe_plan(config.model_copy(update={"engine": kept}), world_size=2)
    assert "FSDP2 (parameters stay after the forward pass) on 2 ranks" in plan


def long_run(tmp_path: Path, tiny_data: Path) -> Path:
    return write_config(
        tmp_path / "long",
        tiny_data,
        training={"max_steps": 100_000, "eval_steps": None},
        checkpoint={"save_steps": 50_000},
    )


def wait_for_steps(run_dir: Path) -> None:
    wait_until(lambda: len(losses(run_dir)) >= 2, timeout_s=START_S, what="two steps")


def test_sigterm_to_the_deepspeed_command_ends_in_a_checkpoint_and_no_orphan(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = long_run(tmp_path, tiny_data)
    run_dir = tmp_path / "long/run"
    process = begin(launching.deepspeed_command(config), tmp_path / "log")
    wait_for_steps(run_dir)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    wait_until(lambda: not ranks_of(config), timeout_s=40, what="the end of all ranks")
    [step] = committed_steps(run_dir)
    result = finish(launching.python_command(config, f"training.max_steps={step + 1}"))
    require_success(result)
    assert f"resumed after step {step}" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_a_rank_ends_in_a_checkpoint_and_says_continue(
    tiny_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = long_run(tmp_path, tiny_data)
    process = begin(launching.python_command(config), tmp_path / "log")
    wait_for_steps(tmp_path / "long/run")
    assert status_of(tmp_path / "long/run").state == "running"
    process.send_signal(number)
    assert process.wait(timeout=60) == EXIT_STOPPED
    log = (tmp_path / "log").read_text()
    assert f"stopped by {number.name} after step" in log
    [step] = committed_steps(tmp_path / "long/run")
    assert read_manifest(checkpoint_folder(tmp_path / "long/run", step)).progress.step == step
    [start] = status_of(tmp_path / "long/run").starts
    assert (start.reason, start.detail, start.exit_code) == ("stopped", number.name, 75)
    assert start.last_step == step


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = long_run(tmp_path, tiny_data)
    first = begin(launching.python_command(config), tmp_path / "log")
    wait_for_steps(tmp_path / "long/run")
    second = finish(launching.python_command(config))
    assert second.returncode == 2
    assert "another run is training in it" in second.stderr
    assert first.poll() is None
    assert len(status_of(tmp_path / "long/run").starts) == 1, "what never held it leaves no trace"
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == EXIT_STOPPED


def test_the_run_folder_holds_what_the_readme_draws(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "folder", tiny_data, telemetry={"tensorboard": True})
    require_success(finish(launching.python_command(config)))
    run_dir = tmp_path / "folder/run"
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "lock",
        "logs",
        "metrics.jsonl",
        "parameters.txt",
        "starts.jsonl",
        "tensorboard",
    ]
    assert "mixer.A_log" in (run_dir / "parameters.txt").read_text()
    assert {"torch", "deepspeed"} <= json.loads((run_dir / "environment.json").read_text()).keys()
    validations = [r for r in read_metrics(run_dir) if "val_loss" in r]
    assert [r["step"] for r in validations] == [5, 10]
    status = status_of(run_dir)
    assert (status.state, status.step, status.total_steps) == ("ended", 10, 10)
    assert [(start.reason, start.launcher) for start in status.starts] == [("finished", "python")]
    assert (status.checkpoint and status.checkpoint.step, status.remaining_s) == (10, 0)


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_are_trained_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, checkpoint={"keep_last": 1})
    run_dir = tmp_path / "run"
    require_success(finish(launching.python_command(config, "checkpoint.keep_last=3")))
    wanted = state_hashes(run_dir, 10)
    victim = checkpoint_folder(run_dir, 10) / "rank-00000.safetensors"
    os.truncate(victim, victim.stat().st_size - 1)
    result = finish(launching.python_command(config))
    require_success(result)
    assert f"passing over step 10: {victim}" in result.stderr
    assert "resumed after step 5" in result.stderr
    assert state_hashes(run_dir, 10) == wanted
    assert committed_steps(run_dir) == [10]
    assert (run_dir / "checkpoints/step-00000010.damaged").is_dir()


def loaders_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_a_loader_that_dies_on_one_rank_ends_the_run_with_its_reason(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "long",
        tiny_data,
        training={"max_steps": 100_000, "eval_steps": None},
        data={"num_workers": 1},
    )
    process = begin(launching.deepspeed_command(config), tmp_path / "log")
    wait_for_steps(tmp_path / "long/run")
    victims = [loader for rank in ranks_of(config) for loader in loaders_of(rank)]
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "a loader process died" in (tmp_path / "log").read_text()
    wait_until(lambda: not ranks_of(config), timeout_s=20, what="the end of all ranks")
    # Whichever rank it was: what it said is found, also if the launcher killed the other at once.
    status = status_of(tmp_path / "long/run")
    told = [fault.text for fault in status.faults if fault.text]
    assert any("mistake: a loader process died" in text for text in told)


def test_evaluation_writes_the_summary_beside_the_baselines(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    run_dir = tmp_path / "run"
    require_success(finish(launching.python_command(config)))
    evaluate = ("tools/evaluate.py", run_dir, "--baselines", "--max-sequences", "4")
    require_success(run_script(*evaluate, cwd=tmp_path))
    summary = json.loads((run_dir / "summary.json").read_text())
    last = [r for r in read_metrics(run_dir) if "val_loss" in r][-1]
    assert summary["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert summary["tokens"] == [r for r in read_metrics(run_dir) if "loss" in r][-1]["tokens"]
    # Ten steps of eight windows; text of ten words is easier for a bigram than for a unigram.
    assert 0 < summary["bigram_full_loss"] <= summary["bigram_loss"] < summary["unigram_loss"]
    assert summary["seconds"] > 0
    one = run_script(evaluate[0], checkpoint_folder(run_dir, 10), "--baselines", cwd=tmp_path)
    assert one.returncode == 2
    assert "is one checkpoint" in one.stderr
    assert not (checkpoint_folder(run_dir, 10) / "summary.json").exists()


def planned(tiny_data: Path, tmp_path: Path, packing: str) -> Path:
    """The config of a run on a copy of the tiny data set that has the plan it needs."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    config = write_config(tmp_path, data, data={"packing": packing})
    assert plan_packing(["--config", str(config)]) == 0
    return config


@pytest.mark.parametrize("packing", ["best_fit", pytest.param("pad", marks=pytest.mark.slow)])
def test_a_planned_packing_trains_on_its_labels_and_is_compared_with_baselines(
    tiny_data: Path, tmp_path: Path, packing: Packing
) -> None:
    config = planned(tiny_data, tmp_path, packing)
    run_dir = tmp_path / "run"
    require_success(finish(launching.python_command(config)))
    dataset = open_dataset(tmp_path / "data/shards")
    samples = training_samples(dataset, packing=packing, length=128)
    order = SampleOrder(len(samples), seed=0)
    records = [r for r in read_metrics(run_dir) if "loss" in r]
    labels = 0
    for step, record in enumerate(records):
        positions = range(8 * step, 8 * step + 8)
        ids = [SampleId(0, order.locate(position)[1]) for position in positions]
        own = int((pack([samples], ids, pad_token_id=0).labels != IGNORED_LABEL).sum())
        labels += own
        assert record["tokens"] == labels
        assert record["unlabelled_share"] == pytest.approx(1 - own / (8 * 128))
    assert losses(run_dir)[10] < losses(run_dir)[1] - 0.5

    evaluate = ("tools/evaluate.py", run_dir, "--baselines", "--max-sequences", "4")
    require_success(run_script(*evaluate, cwd=tmp_path))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tokens"] == labels
    assert 0 < summary["bigram_full_loss"] <= summary["bigram_loss"] < summary["unigram_loss"]


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_packing_it_began_with(tiny_data: Path, tmp_path: Path) -> None:
    config = planned(tiny_data, tmp_path, "best_fit")
    run_dir = tmp_path / "run"
    require_success(finish(launching.python_command(config)))
    wanted = state_hashes(run_dir, 10)
    shutil.rmtree(checkpoint_folder(run_dir, 10))
    changed = finish(launching.python_command(config, "data.packing=concat"))
    assert changed.returncode == 2
    assert "was trained with data.packing = 'best_fit'" in changed.stderr
    result = finish(launching.python_command(config))
    require_success(result)
    assert "resumed after step 5" in result.stderr
    assert state_hashes(run_dir, 10) == wanted
