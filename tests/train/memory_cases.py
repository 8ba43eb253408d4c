"""The runs of which memory_worker.py measures what they take."""

from typing import Any

from mamba_dist.config.schema import RunConfig


def run_config(
    engine: dict[str, Any], model: dict[str, Any], training: dict[str, Any], length: int
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 256, "n_layers": 8, "vocab_size": 512, **model},
            "training": {
                "max_steps": 2,
                "warmup_steps": 1,
                "gradient_accumulation_steps": 1,
                **training,
            },
            "engine": engine,
            "data": {"sequence_length": length},
        }
    )
