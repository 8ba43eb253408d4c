"""One road and many single steps by version 1 configs, for tests/train/test_v1_fields.py.

The road: `data_prep/tokenize.py` and `launch/train.py` by one YAML file in which no field has its
default. The steps: the first of the real loop, from JSON files that differ in one field each.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import ROOT, clean_environment, run_script
from torch import Tensor

from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import CheckpointManifest, read_manifest
from mamba_dist.data.dataset import open_dataset
from mamba_dist.telemetry.metrics import read_metrics

WORKER = Path(__file__).with_name("v1_worker.py")
DOCUMENTS = 24

V1 = {
    "model": {
        "d_model": 24,
        "d_state": 8,
        "d_conv": 3,
        "expand": 3,
        "n_layers": 2,
        "vocab_size": 301,
        "pad_token_id": 7,
    },
    "training": {
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "max_grad_norm": 0.25,
        "num_epochs": 2,
        "warmup_steps": 4,
        "save_steps": 9,
        "eval_steps": 7,
        "use_mixed_precision": False,
        "gradient_checkpointing": True,
    },
    "data": {
        "max_seq_length": 96,
        "tokenizer_path": "words.json",
        "dataset_path": "made/shards",
        "num_workers": 2,
        "preprocessing_batch_size": 5,
        "train_split": 0.7,
        "val_split": 0.3,
        "shuffle_data": False,
    },
}


def changed(values: dict[str, object]) -> dict[str, dict[str, object]]:
    """V1 with new values of the fields at dotted paths."""
    document = {section: dict(fields) for section, fields in V1.items()}
    for path, value in values.items():
        section, name = path.split(".")
        document[section][name] = value
    return document


@dataclass(frozen=True)
class Made:
    """The folder in which the real commands ran, and what they left."""

    folder: Path
    loader_processes: int
    records: list[dict[str, float | None]]
    manifest: CheckpointManifest

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "old"

    @property
    def steps(self) -> int:
        """Optimizer steps that two epochs of the training windows make."""
        tokens = open_dataset(self.folder / "made/shards").train.tokens
        return 2 * ((tokens - 1) // 96) // (2 * 3)


def loader_processes(pid: int) -> int:
    """Living processes that multiprocessing spawned for `pid`, its tracker not counted."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            spawned = b"spawn_main" in stat.with_name("cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        found += parent == pid and spawned
    return found


def train_and_watch(folder: Path) -> int:
    """The most loader processes seen while `launch/train.py --config old.yaml` trained."""
    words = ["--config", "old.yaml", "telemetry.log_steps=1", "checkpoint.keep_last=100"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/train.py"), *words],
            cwd=folder,
            env=clean_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    most = 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        most = max(most, loader_processes(process.pid))
        time.sleep(0.02)
    process.kill()
    assert process.wait() == 0, (folder / "log").read_text()[-3000:]
    return most


def walk_the_road(tiny_data: Path, folder: Path) -> Made:
    """Text to a trained model through the commands, by one version 1 file."""
    (folder / "corpus").mkdir()
    for document in sorted((tiny_data / "corpus").iterdir())[:DOCUMENTS]:
        shutil.copy(document, folder / "corpus")
    shutil.copy(tiny_data / "tokenizer.json", folder / "words.json")
    (folder / "old.yaml").write_text(yaml.safe_dump(V1))
    result = run_script(
        "data_prep/tokenize.py", "corpus", "--config", "old.yaml", "--workers", "1", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    most = train_and_watch(folder)
    run_dir = folder / "runs/old"
    last = committed_steps(run_dir)[-1]
    manifest = read_manifest(checkpoint_folder(run_dir, last))
    return Made(folder, most, read_metrics(run_dir), manifest)


@dataclass(frozen=True)
class Step:
    """What one step of the real loop showed, and the weights around it."""

    seen: dict[str, Any]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def moved(self, name: str) -> Tensor:
        return self.after[name] - self.before[name]


# All single steps are taken at the full learning rate and read their batches themselves.
BASE: dict[str, object] = {
    "training.warmup_steps": 0,
    "training.gradient_checkpointing": False,
    "data.num_workers": 0,
}
CASES: dict[str, dict[str, object]] = {
    "base": {},
    "pad_token_id": {"model.pad_token_id": 11},
    "batch_size": {"training.batch_size": 5},
    "gradient_accumulation_steps": {"training.gradient_accumulation_steps": 2},
    "learning_rate": {"training.learning_rate": 8e-3},
    "weight_decay": {"training.weight_decay": 0.55},
    "max_grad_norm": {"training.max_grad_norm": 1e6},
    "gradient_checkpointing": {"training.gradient_checkpointing": True},
    "max_seq_length": {"data.max_seq_length": 32},
    "shuffle_data": {"data.shuffle_data": True},
    # Last: DeepSpeed's autocast, once on, stays on in its process.
    "use_mixed_precision": {"training.use_mixed_precision": True},
}


def take_steps(made: Made, folder: Path) -> dict[str, Step]:
    """The first step of a run for each of CASES."""
    files = {
        "data.dataset_path": str(made.folder / "made/shards"),
        "data.tokenizer_path": str(made.folder / "words.json"),
    }
    for name, differences in CASES.items():
        document = changed({**BASE, **files, **differences})
        (folder / f"{name}.json").write_text(json.dumps(document))
    result = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *CASES],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {seen["name"]: Step(seen, **torch.load(folder / f"{seen['name']}.pt")) for seen in lines}
