"""The language model: embedding, blocks, final norm, head; names follow state-spaces/mamba.

Parameters are fp32 and stay it; run the model under `torch.autocast` for bf16 matrix products. What
must not lose precision (residual stream, norms, A, D, dt bias, scan state, loss) is fp32 even then.

B batch, L length, D d_model, V vocabulary with padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamba_dist.config.schema import ActivationCheckpointing, MambaConfig
from mamba_dist.model.block import Block
from mamba_dist.model.layers import Embedding
from mamba_dist.model.norm import AddRMSNorm
from mamba_dist.model.recomputation import recomputed
from mamba_dist.model.state import LayerState
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.linear import linear


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(
        self,
        config: MambaConfig,
        *,
        backend: str,
        activation_checkpointing: ActivationCheckpointing,
    ) -> None:
        super().__init__()
        self._recomputes_blocks = activation_checkpointing == "full"
        self.embedding = Embedding(config.padded_vocab_size, config.d_model)
        selective_recomputation = activation_checkpointing == "selective"
        self.layers = nn.ModuleList(
            Block(config, backend=backend, selective_recomputation=selective_recomputation)
            for _ in range(config.n_layers)
        )
        self.norm_f = AddRMSNorm(config.d_model, eps=config.norm_eps, backend=backend)

    def forward(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None = None,
        states: Sequence[LayerState] | None = None,
        *,
        keep_state: bool = False,
        donate_states: bool = False,
    ) -> tuple[Tensor, list[LayerState]]:
        """Normed hidden (B, L, D), and the state of each layer if they are to be kept, else []."""
        mixed, residual = self.embedding(input_ids), None
        new_states: list[LayerState] = []
        for i, block in enumerate(self.layers):
            state = None if states is None else states[i]
            if self._recomputes_blocks and torch.is_grad_enabled() and not keep_state:
                mixed = _recomputed_block(block, mixed, seq_idx, state)
                continue
            mixed, residual, new_state = block(
                mixed, residual, seq_idx, state, keep_state=keep_state, donate_state=donate_states
            )
            if new_state is not None:
                new_states.append(new_state)
        return self.norm_f(mixed, residual)[0], new_states


class Head(nn.Module):
    """Projection to the vocabulary, alone or fused with the loss; padding ids are impossible."""

    def __init__(
        self, config: MambaConfig, *, tied_weight: nn.Parameter | None, backend: str
    ) -> None:
        super().__init__()
        self._vocab_size = config.vocab_size
        self._backend = backend
        if tied_weight is None:
            shape = (config.padded_vocab_size, config.d_model)
            self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        else:
            self.weight = tied_weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, L, V), -inf at padding ids; with labels the sum of -log p, () fp32."""
        if labels is not None:
            return linear_cross_entropy(
                hidden, self.weight, labels, vocab_size=self._vocab_size, backend=self._backend
            )
        logits = linear(hidden, self.weight, backend=self._backend)
        logits[..., self._vocab_size :] = -torch.inf
        return logits


class MambaLM(nn.Module):
    """Mamba language model; parameters are unset until `initialize` or `load_parameters`."""

    def __init__(
        self,
        config: MambaConfig,
        *,
        backend: str = "torch",
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(
            config, backend=backend, activation_checkpointing=activation_checkpointing
        )
        tied_weight = self.backbone.embedding.weight if config.tie_embeddings else None
        self.lm_head = Head(config, tied_weight=tied_weight, backend=backend)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Nearly all of the layers' weights: under autocast they are read in its dtype only.

        A layer's forward calls theirs, and nobody else reads their parameters.
        """
        mixers = [block.mixer for block in self.backbone.layers if isinstance(block, Block)]
        return tuple(part for mixer in mixers for part in (mixer.in_proj, mixer.out_proj))

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, seq_idx: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, V); with labels the sum of -log p over labels other than -100, () fp32.

        The loss is a sum and never a mean, since only the caller knows how many labels the whole
        optimizer step has over all ranks. Logits of padding ids (vocab_size and above) are -inf.

        Args:
            input_ids: (B, L) int64.
            labels: (B, L) int64, the id to predict at each position, -100 where there is none.
            seq_idx: (B, L) int32; a document starts wherever it changes, and sees nothing before.
        """
        hidden, _ = self.backbone(input_ids, seq_idx)
        logits_or_loss: Tensor = self.lm_head(hidden, labels)
        return logits_or_loss

    def forward_with_state(
        self,
        input_ids: Tensor,
        states: Sequence[LayerState] | None = None,
        *,
        seq_idx: Tensor | None = None,
        last_only: bool = False,
        donate_states: bool = False,
    ) -> tuple[Tensor, list[LayerState]]:
        """Logits (B, L, V), (B, 1, V) if `last_only`, and the state of each layer after L tokens.

        Windows can be chained: feed the returned states with the next tokens, down to one a time.
        States carry gradients. Call it on a whole model: DeepSpeed hooks into `forward` only.

        Args:
            input_ids: (B, L) int64.
            states: what the window before returned; None at the start of a text.
            seq_idx: (B, L) int32; `states` belong to the first document of each row.
            last_only: compute the head at the last position only.
            donate_states: `states` may be overwritten if nobody needs a gradient: a tensor of them
                that was is itself the new state's, the others are as they were. No two of them may
                share memory.
        """
        hidden, new_states = self.backbone(
            input_ids, seq_idx, states, keep_state=True, donate_states=donate_states
        )
        logits: Tensor = self.lm_head(hidden[:, -1:] if last_only else hidden)
        return logits, new_states


def _recomputed_block(
    block: nn.Module, stream: Tensor, seq_idx: Tensor | None, state: LayerState | None
) -> Tensor:
    """The stream after the block, keeping only the one before it for the backward pass."""

    def run(stream: Tensor) -> Tensor:
        mixed, residual, _ = block(stream, None, seq_idx, state)
        # Added here and not by the next block, which would have to keep both terms.
        added: Tensor = residual + mixed
        return added

    return recomputed(run, stream)
