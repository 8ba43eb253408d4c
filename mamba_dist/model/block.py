"""Pre-norm residual block: x + mixer(norm(x)) with the stream x in fp32 (residual_in_fp32).

A block begins by the addition that the one before has left open, so that addition and norm are one
pass over the stream (`fused_add_norm` in state-spaces/mamba).

B batch, L length, D d_model.
"""

from torch import Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.mamba1 import Mamba1Mixer
from mamba_dist.model.mamba2 import Mamba2Mixer
from mamba_dist.model.norm import AddRMSNorm
from mamba_dist.model.state import LayerState


class Block(nn.Module):
    """One layer of the backbone."""

    def __init__(
        self, config: MambaConfig, *, backend: str, selective_recomputation: bool = False
    ) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config.d_model, eps=config.norm_eps, backend=backend)
        self.mixer: Mamba1Mixer | Mamba2Mixer
        mixer = Mamba1Mixer if config.layer == "mamba1" else Mamba2Mixer
        self.mixer = mixer(config, backend=backend, selective_recomputation=selective_recomputation)

    def forward(
        self,
        mixed: Tensor,
        residual: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
        *,
        keep_state: bool = False,
        donate_state: bool = False,
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        """What is to be added to the stream, the stream (B, L, D) fp32, and the state if kept.

        Args:
            mixed: (B, L, D), what the layer before gave.
            residual: (B, L, D), the stream that `mixed` has not been added to yet; None if `mixed`
                is the stream itself.
            seq_idx: (B, L) int32; a document starts wherever it changes.
            state: what an earlier window left behind, for the first document of each row.
            keep_state: also return the state.
            donate_state: `state` may be overwritten by the new one.
        """
        normed, residual = self.norm(mixed, residual)
        mixed, new_state = self.mixer(
            normed, seq_idx, state, keep_state=keep_state, donate_state=donate_state
        )
        return mixed, residual, new_state
