"""Pre-norm residual block: x + mixer(norm(x)) with the stream x in fp32 (residual_in_fp32).

B batch, L length, D d_model.
"""

from torch import Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.layers import wide
from mamba_dist.model.mamba1 import Mamba1Mixer
from mamba_dist.model.mamba2 import Mamba2Mixer
from mamba_dist.model.norm import RMSNorm
from mamba_dist.model.state import LayerState


class Block(nn.Module):
    """One layer of the backbone."""

    def __init__(self, config: MambaConfig, *, backend: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer: Mamba1Mixer | Mamba2Mixer
        if config.layer == "mamba1":
            self.mixer = Mamba1Mixer(config, backend=backend)
        else:
            self.mixer = Mamba2Mixer(config, backend=backend)

    def forward(
        self,
        residual: Tensor,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
        *,
        keep_state: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """The stream (B, L, D) fp32 after this layer, and its state if it is to be kept."""
        mixed, new_state = self.mixer(self.norm(residual), seq_idx, state, keep_state=keep_state)
        return wide(residual) + mixed, new_state
