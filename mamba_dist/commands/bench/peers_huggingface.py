"""Hugging Face transformers: both language models and Mamba-2's chunked scan, on plain PyTorch.

transformers takes mamba-ssm's or the hub's kernels where those are installed; with them a CPU run
fails, so their presence is refused here. Nothing is downloaded.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config import schema

_KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d", "kernels")


def chunk_scan(chunk_size: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The chunked scan of their Mamba-2 mixer, for inputs by our names.

    Raises:
        NotMeasuredError: kernels are installed, or this version has it as a part of the mixer only.
    """
    _refuse_kernels()
    function = getattr(modeling_mamba2, "mamba2_chunk_scan", None)
    if function is None:
        raise NotMeasuredError(
            f"transformers {transformers.__version__} has no mamba2_chunk_scan to call by itself; "
            "pip install -U transformers"
        )

    def scan(x: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = function(
            x["x"],
            x["dt"],
            x["A"],
            x["B"],
            x["C"],
            chunk_size=chunk_size,
            D=x["D"],
            dt_bias=x["dt_bias"],
            dt_softplus=True,
        )
        return y

    return scan


def huggingface_model(config: schema.MambaConfig, *, use_mambapy: bool) -> nn.Module:
    """Their model of the same shape; its logits are those of ours under the same weights.

    Args:
        config: of our model.
        use_mambapy: Mamba-1 by mamba.py's parallel scan instead of the loop over the sequence.

    Raises:
        NotMeasuredError: kernels are installed, or mamba.py is not.
    """
    _refuse_kernels()
    shape: dict[str, Any] = {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "num_hidden_layers": config.n_layers,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "layer_norm_epsilon": config.norm_eps,
        "use_bias": config.proj_bias,
        "use_conv_bias": config.conv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "residual_in_fp32": True,
        "time_step_rank": config.resolved_dt_rank,
    }
    if config.layer == "mamba1":
        if use_mambapy and find_spec("mambapy") is None:
            # transformers would take the loop without a word.
            raise NotMeasuredError("mambapy is not installed; pip install mambapy")
        return _Logits(MambaForCausalLM(MambaConfig(**shape, use_mambapy=use_mambapy)))
    shape |= {
        "num_heads": config.n_heads,
        "head_dim": config.headdim,
        "n_groups": config.ngroups,
        "chunk_size": config.chunk_size,
    }
    return _Logits(Mamba2ForCausalLM(Mamba2Config(**shape)))


class _Logits(nn.Module):
    """Their model without the wrapper around its result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V)."""
        logits: Tensor = self.model(input_ids, use_cache=False).logits
        return logits


def _refuse_kernels() -> None:
    installed = [name for name in _KERNEL_PACKAGES if find_spec(name) is not None]
    if installed:
        raise NotMeasuredError(
            f"{', '.join(installed)} is installed, so transformers would not take its PyTorch path"
        )
