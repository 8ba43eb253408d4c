"""mamba.py (PyPI: mambapy): its parallel scan, and a language model of its blocks."""

from collections.abc import Mapping

from mambapy.mamba import Mamba, MambaBlock, MambaConfig, RMSNorm
from torch import Tensor, nn

from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config import schema


def selective_scan(x: Mapping[str, Tensor]) -> Tensor:
    """y (B, L, E) of their block's scan, for inputs by our names, one group."""
    # The method reads nothing of its block.
    y: Tensor = MambaBlock.selective_scan(
        None, x["u"], x["delta"], x["A"], x["B"].squeeze(2), x["C"].squeeze(2), x["D"]
    )
    return y


def mambapy_model(config: schema.MambaConfig) -> nn.Module:
    """Their Mamba between an embedding and a head, which share a weight if ours do.

    Raises:
        NotMeasuredError: mamba.py cannot be given that shape.
    """
    if config.layer != "mamba1":
        raise NotMeasuredError("mamba.py's Mamba-2 runs on mamba-ssm's GPU kernels only")
    if not config.conv_bias or config.proj_bias:
        raise NotMeasuredError("mamba.py is measured with conv_bias and without proj_bias")
    return _LanguageModel(config)


class _LanguageModel(nn.Module):
    """As their lm.py, which cannot be imported without mamba-ssm."""

    def __init__(self, config: schema.MambaConfig) -> None:
        super().__init__()
        shape = MambaConfig(
            d_model=config.d_model,
            n_layers=config.n_layers,
            dt_rank=config.resolved_dt_rank,
            d_state=config.d_state,
            expand_factor=config.expand,
            d_conv=config.d_conv,
            rms_norm_eps=config.norm_eps,
        )
        # Names as ours, so that one initialisation serves both.
        self.backbone = Mamba(shape)
        self.backbone.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.backbone.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V)."""
        hidden = self.backbone.norm_f(self.backbone(self.backbone.embedding(input_ids)))
        logits: Tensor = self.lm_head(hidden)
        return logits
