"""Mistakes at the start of a run: one clear error each, exit code 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import yaml
from launching import finish, write_config
from processes import ROOT, run_script

from mamba_dist.checkpoint.layout import committed_steps


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def copied_data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def shard_of(data: Path) -> Path:
    return max((data / "shards").rglob("*.arrow"), key=lambda path: path.stat().st_size)


def test_a_truncated_shard_is_named(tiny_data: Path, tmp_path: Path) -> None:
    data = copied_data(tiny_data, tmp_path)
    os.truncate(shard_of(data), shard_of(data).stat().st_size - 7)
    config = write_config(tmp_path / "run", data)
    assert shard_of(data).name in error_of(finish(launching.python_command(config)))
    assert not committed_steps(tmp_path / "run/run")


def test_a_missing_data_set_says_how_to_make_one(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, data={"dataset_path": str(tmp_path / "nowhere")})
    message = error_of(finish(launching.python_command(config)))
    assert "nowhere" in message
    assert "tokenize" in message


def test_a_model_that_no_host_can_hold_is_refused_beside_what_else_is_wrong(
    tiny_data: Path, tmp_path: Path
) -> None:
    nowhere = {"dataset_path": str(tmp_path / "nowhere")}
    huge = {"d_model": 16384, "n_layers": 1024}
    config = write_config(tmp_path, tiny_data, data=nowhere, model=huge)
    result = finish(launching.python_command(config))
    assert "problems at the start" in error_of(result)
    [line] = [line for line in result.stderr.splitlines() if "does not fit" in line]
    assert "x 16 bytes" in line
    assert "GiB free" in line
    assert "nowhere" in result.stderr
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"vocab_size": 128}}, ["vocab_size", "300"]),
        ({"data": {"train_split": 0.8, "val_split": 0.2}}, ["0.9", "0.8"]),
        ({"training": {"warmup_steps": 9, "max_steps": None, "max_tokens": 3000}}, ["warmup"]),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_refused(
    tiny_data: Path, tmp_path: Path, changes: dict[str, dict[str, object]], words: list[str]
) -> None:
    config = write_config(tmp_path, tiny_data, **changes)
    message = error_of(finish(launching.python_command(config)))
    for word in words:
        assert word in message


def test_another_tokenizer_than_the_shards_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    data = copied_data(tiny_data, tmp_path)
    content = json.loads((data / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [t for t, i in vocabulary.items() if i in (40, 41)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (data / "tokenizer.json").write_text(json.dumps(content))
    message = error_of(finish(launching.python_command(write_config(tmp_path / "run", data))))
    assert "tokenizer" in message


def test_a_checkpoint_of_another_model_is_refused_and_kept(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    assert finish(launching.python_command(config)).returncode == 0
    message = error_of(finish(launching.python_command(config, "model.d_state=8")))
    assert "model.d_state" in message
    assert committed_steps(tmp_path / "run") == [5, 10]


def test_resume_required_without_a_checkpoint_is_an_error(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, checkpoint={"resume": "required"})
    assert "no checkpoint to resume" in error_of(finish(launching.python_command(config)))


def test_an_odd_world_size_is_refused_with_the_ones_that_divide(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    result = run_script(
        "launch/train.py", "--config", config, "--dry-run", "--ranks", "3", cwd=tmp_path
    )
    message = error_of(result)
    assert "global_batch_size" in message
    assert "1, 2, 4" in message


def test_a_packing_without_its_plan_is_refused_with_the_command_that_makes_it(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, data={"packing": "best_fit"})
    message = error_of(finish(launching.python_command(config)))
    command = f"tools/plan_packing.py {tiny_data}/shards --packing best_fit --sequence-length 128"
    assert message.endswith(f"which does not exist; make it by `python {command}`")


def test_under_a_launcher_each_error_is_printed_once(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    result = finish(launching.deepspeed_command(config, "training.learning_rate=-1"))
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("error: ") == 1
    assert (result.stdout + result.stderr).count("greater than 0") <= 1


def test_an_error_after_the_start_is_printed_once_too(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data, data={"dataset_path": str(tmp_path / "nowhere")})
    result = finish(launching.deepspeed_command(config))
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("error: ") == 1


def modules_after(arguments: list[str]) -> tuple[int, set[str]]:
    """Exit code and imported modules of launch/train.py's main."""
    code = (
        "import json, sys\n"
        "from mamba_dist.commands.train import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    code = exit.code\n"
        "print('\\n' + json.dumps([code, sorted(sys.modules)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    code_found, modules = json.loads(result.stdout.splitlines()[-1])
    return code_found, set(modules)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--config", "configs/quickstart.yaml", "--check"], 0),
        (["--config", "configs/quickstart.yaml", "training.seed=-1"], 2),
    ],
)
def test_nothing_heavy_is_imported_before_the_config_is_known_to_be_good(
    arguments: list[str], code: int
) -> None:
    found, modules = modules_after(arguments)
    assert found == code
    assert not modules & {"torch", "deepspeed", "numpy", "pyarrow"}


def test_a_zero_stage_under_fsdp2_is_refused_with_what_to_write(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data, engine={"kind": "fsdp2"})
    check = ("launch/train.py", "--config", config, "--check")
    result = run_script(*check, cwd=tmp_path)
    assert "engine.zero_stage: found 1, but engine.kind fsdp2 has no stages" in result.stderr
    assert result.returncode == 2
    assert run_script(*check, "engine.zero_stage=null", cwd=tmp_path).returncode == 0


def test_a_version_one_config_trains_and_tells_what_its_fields_became(
    tiny_data: Path, tmp_path: Path
) -> None:
    old = {
        "model": {"d_model": 64, "n_layers": 1, "vocab_size": 304},
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 1},
        "data": {
            "max_seq_length": 64,
            "dataset_path": str(tiny_data / "shards"),
            "tokenizer_path": str(tiny_data / "tokenizer.json"),
            "num_workers": 0,
        },
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old))
    run_dir = f"training.run_dir={tmp_path / 'run'}"
    result = finish(launching.python_command(path, run_dir, "training.max_steps=3"))
    assert result.returncode == 0, result.stderr
    assert "training.micro_batch_size" in result.stdout
    assert committed_steps(tmp_path / "run") == [3]
