"""The config of a run of seconds, on the tiny data set of the tests."""

from pathlib import Path
from typing import Any

import yaml


def write_config(folder: Path, made: Path, /, **changes: dict[str, Any]) -> Path:
    """A small run of ten steps with a checkpoint in the middle; `changes` are merged by section."""
    config: dict[str, dict[str, Any]] = {
        "model": {"d_model": 64, "n_layers": 2, "vocab_size": 304},
        "training": {
            "run_dir": str(folder / "run"),
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "max_steps": 10,
            "eval_steps": 5,
            "eval_sequences": 4,
            "precision": "fp32",
        },
        "data": {
            "dataset_path": str(made / "shards"),
            "tokenizer_path": str(made / "tokenizer.json"),
            "sequence_length": 128,
            "num_workers": 0,
        },
        "engine": {"zero_stage": 1},
        "checkpoint": {"save_steps": 5},
        "telemetry": {"log_steps": 1, "tensorboard": False, "progress_bar": False},
    }
    for section, fields in changes.items():
        config[section].update(fields)
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"schema_version": 2, **config}))
    return path
