"""mamba-ssm's language model in our shape, for the benchmarks. Written for mamba-ssm 2.3."""

from typing import Any, Final

import torch
from torch import nn

from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config.schema import MambaConfig, RunConfig
from mamba_dist.ops.cuda_packages import mamba_lm_head_model

_NORM_EPS: Final = 1e-5


def shape_refusal(config: MambaConfig) -> str | None:
    """Why their model cannot have that shape; None if it can."""
    if config.norm_eps != _NORM_EPS:
        return f"mamba-ssm's model has a fixed norm_eps of {_NORM_EPS:g}, not {config.norm_eps:g}"
    return None


def training_refusal(config: RunConfig) -> str | None:
    """Why their model cannot be trained as `config` says; None if it can."""
    # Its fused mixer computes again what `selective` does, and has no way to compute more.
    if config.training.activation_checkpointing == "full":
        return "mamba-ssm's model does not checkpoint its blocks"
    return shape_refusal(config.model)


def peer_model(config: MambaConfig, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Their model with the settings of those that they have published, and weights of their own.

    Names and shapes of its parameters are ours.

    Raises:
        NotMeasuredError: it cannot be given that shape.
        BackendError: mamba-ssm cannot be imported.
    """
    refusal = shape_refusal(config)
    if refusal is not None:
        raise NotMeasuredError(refusal)
    make_model, make_config = mamba_lm_head_model()
    shape = make_config(
        d_model=config.d_model,
        n_layer=config.n_layers,
        vocab_size=config.vocab_size,
        ssm_cfg=_mixer(config),
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=config.pad_vocab_size_multiple,
        tie_embeddings=config.tie_embeddings,
    )
    model: nn.Module = make_model(shape, device=device, dtype=dtype)
    return model


def _mixer(config: MambaConfig) -> dict[str, Any]:
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
