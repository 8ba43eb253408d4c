"""Learning rate and length of a run as pure functions of the step.

Steps count from 0; the rate of step 0 is the one of the first update. Shapes: linear warm-up, then
cosine (arXiv 1608.03983, one period), linear, constant, or warm-up-stable-decay (arXiv 2404.06395,
linear decay).
"""

import math

from mamba_dist.config.schema import TrainingConfig
from mamba_dist.errors import ConfigError


def learning_rate(config: TrainingConfig, *, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` of `total_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    # The last step reaches the floor.
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    match config.lr_schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = floor + (1 - floor) * (1 - progress)
        case "cosine":
            share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        case "wsd":
            # The decay never reaches back into the warm-up.
            decay_steps = min(
                max(1, round(config.decay_share * total_steps)),
                max(1, total_steps - config.warmup_steps),
            )
            left = (total_steps - 1 - step) / decay_steps
            share = floor + (1 - floor) * min(1.0, left)
    return config.learning_rate * share


def total_steps(
    config: TrainingConfig,
    *,
    epoch_sequences: int,
    global_batch_size: int,
    sequence_length: int,
    done_steps: int = 0,
    done_sequences: int = 0,
    left_behind: int = 0,
) -> int:
    """Optimizer steps of the whole run, from whichever length the config gives.

    `global_batch_size` holds after `done_steps`, in which `done_sequences` were read; of these
    `left_behind` belong to data that is no longer part of an epoch.

    Raises:
        ConfigError: the run is not longer than its warm-up.
    """
    if config.max_steps is not None:
        steps = config.max_steps
    elif config.max_tokens is not None:
        left_tokens = max(0, config.max_tokens - done_sequences * sequence_length)
        steps = done_steps + math.ceil(left_tokens / (global_batch_size * sequence_length))
    else:
        done_of_epochs = done_sequences - left_behind
        left_sequences = max(0, (config.num_epochs or 1) * epoch_sequences - done_of_epochs)
        steps = max(1, done_steps + left_sequences // global_batch_size)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"training.warmup_steps is {config.warmup_steps}, but the run is only {steps} steps "
            f"long ({epoch_sequences} training sequences, {global_batch_size} per step); "
            "lower warmup_steps or lengthen the run"
        )
    return steps
