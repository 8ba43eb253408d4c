"""A process of bench gpu-train for mamba-ssm's language model in a plain PyTorch loop.

`python -m` runs it, see `gpu_step.serve`. Written for mamba-ssm 2.3.
"""

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from torch import Tensor

from mamba_dist.commands.bench.gpu_step import (
    SEED,
    Batch,
    Step,
    StepSpec,
    plain_step,
    serve,
    this_device,
)
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config import schema
from mamba_dist.model.init import initialize


def _build(spec: StepSpec, batch: Batch) -> Step:
    config = spec.config
    # Its fused mixer computes again what `selective` does, and has no way to compute more.
    if config.training.activation_checkpointing == "full":
        raise NotMeasuredError("mamba-ssm's model does not checkpoint its blocks")
    model = _language_model(config.model)
    # Names and shapes of their parameters are ours, so one initialisation serves both.
    initialize(model, config.model, seed=SEED, gather=lambda _: nullcontext())

    def loss_sum() -> Tensor:
        logits = model(batch["input_ids"]).logits[..., : config.model.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    return plain_step(model, config.training, loss_sum, spec.tokens)


def _language_model(config: schema.MambaConfig) -> Any:
    """Their model of our shape, with the settings of the models that they have published.

    Raises:
        NotMeasuredError: it cannot be given that shape.
    """
    if config.norm_eps != 1e-5:
        raise NotMeasuredError("mamba-ssm's model has a fixed norm_eps of 1e-5")
    return MambaLMHeadModel(
        MambaConfig(
            d_model=config.d_model,
            n_layer=config.n_layers,
            vocab_size=config.vocab_size,
            ssm_cfg=_mixer(config),
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            pad_vocab_size_multiple=config.pad_vocab_size_multiple,
            tie_embeddings=config.tie_embeddings,
        ),
        device=this_device(),
    )


def _mixer(config: schema.MambaConfig) -> dict[str, Any]:
    shared = {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "conv_bias": config.conv_bias,
        "bias": config.proj_bias,
    }
    if config.layer == "mamba1":
        return {"layer": "Mamba1", "dt_rank": config.resolved_dt_rank, **shared}
    return {
        "layer": "Mamba2",
        "headdim": config.headdim,
        "ngroups": config.ngroups,
        "chunk_size": config.chunk_size,
        **shared,
    }


if __name__ == "__main__":
    serve(_build)
