"""Small models whose every parameter matters: none is left at a value that hides a mistake."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM

LAYERS = ("mamba1", "mamba2")


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """The gather of a plain model, whose parameters are whole anyway."""
    return nullcontext()


def small_config(layer: str, **changes: Any) -> MambaConfig:
    fields: dict[str, Any] = {
        "layer": layer,
        "d_model": 48,
        "n_layers": 2,
        "vocab_size": 61,
        "pad_vocab_size_multiple": 16,
        "d_state": 8,
    }
    if layer == "mamba2":
        fields |= {"headdim": 16, "ngroups": 2, "chunk_size": 16}
    return MambaConfig.model_validate(fields | changes)


def initialized(config: MambaConfig, *, seed: int = 0, **options: Any) -> MambaLM:
    model = MambaLM(config, **options)
    initialize(model, config, seed=seed, gather=whole)
    return model


def perturbed(config: MambaConfig, **options: Any) -> MambaLM:
    """Initialised, then moved off the ones and zeros that would hide a missing factor or bias."""
    model = initialized(config, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(rows: int, length: int, *, seed: int = 0, vocab_size: int = 61) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)
