"""What DeepSpeed is told of a stage."""

from typing import Any, Literal

import torch

from mamba_dist.config.engine import EngineConfig

_NEVER = 1 << 62


def zero_settings(
    config: EngineConfig, *, stage: int, precision: Literal["bf16", "fp32"], accumulation_steps: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of an engine, as `deepspeed.initialize` takes it.

    Args:
        stage: see `mamba_dist.engine.memory.stage_for`.
    """
    settings: dict[str, Any] = {
        # Batches are cut by the loader; DeepSpeed only needs a consistent triple.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "steps_per_print": _NEVER,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the device at the start of each forward pass and the end of each step.
        "timers": {"throughput": {"enabled": False}},
        "communication_data_type": config.reduce_dtype,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": config.bucket_elements,
            "allgather_bucket_size": config.bucket_elements,
            "stage3_prefetch_bucket_size": config.bucket_elements,
            # Each layer gathers a bucket further ahead, and what is used again within so many
            # elements stays; with its limits of 10^9 a smaller model's parameters all stayed whole.
            "stage3_max_live_parameters": 2 * config.bucket_elements,
            "stage3_max_reuse_distance": 0,
            # So much of the gradients is copied at once for the update.
            "sub_group_size": 2 * config.bucket_elements,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            # Its replacement of F.linear ignores autocast on CPU.
            "memory_efficient_linear": False,
        },
    }
    if precision == "bf16":
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings
