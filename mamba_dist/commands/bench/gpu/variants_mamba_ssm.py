"""A process of bench gpu-train for mamba-ssm's language model in a plain PyTorch loop.

`python -m` runs it, see `step.serve`.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.commands.bench.gpu.peer_model import peer_model, training_refusal
from mamba_dist.commands.bench.gpu.step import (
    SEED,
    Batch,
    Step,
    StepSpec,
    plain_step,
    serve,
    this_device,
)
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.model.init import initialize


def _build(spec: StepSpec, batch: Batch) -> Step:
    config = spec.config
    reason = training_refusal(config)
    if reason is not None:
        raise NotMeasuredError(reason)
    model = peer_model(config.model, device=this_device(), dtype=torch.float32)
    # Names and shapes of their parameters are ours, so one initialisation serves both.
    initialize(model, config.model, seed=SEED, gather=lambda _: nullcontext())

    def loss_sum() -> Tensor:
        logits = model(batch["input_ids"]).logits[..., : config.model.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    return plain_step(model, spec, loss_sum)


if __name__ == "__main__":
    serve(_build)
