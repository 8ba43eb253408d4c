"""Batch arithmetic: how a global batch is cut into ranks and forward-backwards."""

from dataclasses import dataclass

from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import ConfigError

_LARGEST_WORLD_NAMED = 4096


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step of one world: global = micro * accumulation * ranks, all in sequences."""

    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """How `world_size` ranks share an optimizer step of `config`.

    Raises:
        ConfigError: the global batch cannot be cut evenly; names the numbers of ranks that can.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, expected at least 1")
    training = config.training
    micro = training.micro_batch_size
    if training.global_batch_size is None:
        accumulation = training.gradient_accumulation_steps
        assert accumulation is not None, "the schema requires one of the two"
        return BatchPlan(micro, accumulation, micro * accumulation * world_size)
    microbatches = training.global_batch_size // micro
    if microbatches % world_size:
        largest = min(microbatches, _LARGEST_WORLD_NAMED)
        divisible = [str(w) for w in range(1, largest + 1) if microbatches % w == 0]
        raise ConfigError(
            f"training.global_batch_size {training.global_batch_size} is {microbatches} "
            f"microbatches of training.micro_batch_size {micro}, which {world_size} ranks cannot "
            f"share evenly; numbers of ranks that can: {', '.join(divisible)}"
        )
    return BatchPlan(micro, microbatches // world_size, training.global_batch_size)
