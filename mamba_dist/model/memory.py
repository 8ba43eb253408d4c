"""Bytes of activations that a micro-batch takes on one rank, from the config, tensor by tensor.

Counted is what the forward pass keeps for the backward pass, which each op's `save_for_backward`
says, and the largest that is needed beside it for a while. tests/train/test_memory_model.py
compares it with what is allocated. Needs no torch.

T positions (B L), D d_model, E d_inner, N d_state, R dt_rank, H heads, G groups, V vocabulary; c
bytes of the products' dtype.
"""

from dataclasses import dataclass
from typing import Final, Literal

from mamba_dist.config.schema import ActivationCheckpointing, MambaConfig
from mamba_dist.model.flops import projection_weights

_FP32: Final = 4
# As in the ops: positions between two kept states, and what a chunk of the loss has of logits.
_CPU_SCAN_STEPS: Final = 64
_GPU_SCAN_STEPS: Final = 32
_GPU_SCAN_STATES: Final = 16
_CPU_SSD_STEPS: Final = 256
_CPU_LOGITS: Final = 1 << 21
_CPU_LEAST_TOKENS: Final = 256
_GPU_LOGITS_BYTES: Final = 1 << 29


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at once, and where."""

    sequences: int
    length: int
    precision: Literal["bf16", "fp32"]
    on_gpu: bool

    @property
    def tokens(self) -> int:
        """T, positions of all sequences."""
        return self.sequences * self.length

    @property
    def width_bytes(self) -> int:
        """c, bytes of an element that goes into a product."""
        return 2 if self.precision == "bf16" else _FP32


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one micro-batch; `total` is the most of them that exist at once."""

    layers: int
    """What all layers keep from the forward pass to the backward pass."""
    rounded_weights: int
    """Copies of the projections in bf16 that the products keep with it."""
    working: int
    """What one layer's backward pass needs besides, recomputation included."""
    head: int
    """Final norm, head and loss, with the gradients that the loss computes along with itself."""

    @property
    def total(self) -> int:
        """Head and layers are not at their largest at the same time."""
        return self.layers + self.rounded_weights + max(self.working, self.head)


def activation_bytes(
    config: MambaConfig, batch: MicroBatch, checkpointing: ActivationCheckpointing
) -> ActivationBytes:
    """What a micro-batch takes at most, beside parameters, gradients and optimizer."""
    everything = _layer(config, batch)
    kept = {
        "none": everything,
        "selective": everything - _recomputed(config, batch),
        "full": _FP32 * config.d_model * batch.tokens,
    }[checkpointing]
    rounded = 2 * sum(projection_weights(config).values()) if batch.precision == "bf16" else 0
    stays = checkpointing != "full"
    return ActivationBytes(
        layers=config.n_layers * kept,
        rounded_weights=config.n_layers * rounded if stays else 0,
        working=everything - kept + _gradients(config, batch) + (0 if stays else rounded),
        head=_head(config, batch),
    )


def _layer(config: MambaConfig, batch: MicroBatch) -> int:
    """All that a layer keeps if nothing is computed again."""
    c, width, inner = batch.width_bytes, config.d_model, config.d_inner
    # The stream and its norm.
    per_token = _FP32 * width + c * width
    if config.layer == "mamba1":
        # x and z; what the convolution gives; dt, B and C; delta; y.
        per_token += c * (2 * inner + inner + _x_proj_width(config) + inner + inner)
    else:
        # z, x, B, C and dt; what the convolution gives; y and its gated norm.
        per_token += c * (_in_proj_width(config) + _conv_width(config)) + _gated_norm(config, batch)
    return per_token * batch.tokens + _kept_states(config, batch)


def _recomputed(config: MambaConfig, batch: MicroBatch) -> int:
    """What `selective` computes again: all between the projections but what the scan gave."""
    if config.layer == "mamba1":
        per_token = 2 * config.d_inner + _x_proj_width(config)
    else:
        per_token = _conv_width(config)
        if batch.precision == "bf16" and not batch.on_gpu:
            # The scan's output, of which the norm after it keeps an fp32 copy.
            per_token -= config.d_inner
    return batch.width_bytes * per_token * batch.tokens


def _gated_norm(config: MambaConfig, batch: MicroBatch) -> int:
    """Bytes per token of what Mamba-2's norm and the projection after it keep."""
    inner = config.d_inner
    if batch.on_gpu:
        return 2 * batch.width_bytes * inner
    # PyTorch's operations: y, z and silu(z), their product, its norm, all in fp32, and the output.
    return (5 if batch.precision == "bf16" else 4) * _FP32 * inner + batch.width_bytes * inner


def _kept_states(config: MambaConfig, batch: MicroBatch) -> int:
    """The recurrence's state at every so many positions, fp32."""
    states = config.d_inner * config.d_state
    if config.layer == "mamba1":
        if batch.on_gpu:
            chunks = -(-batch.length // _GPU_SCAN_STEPS)
            return _FP32 * batch.sequences * chunks * config.d_inner * _GPU_SCAN_STATES
        return _FP32 * batch.sequences * -(-batch.length // _CPU_SCAN_STEPS) * states
    if batch.on_gpu:
        return 0
    segment = min(_CPU_SSD_STEPS, 4 * config.chunk_size)
    return _FP32 * batch.sequences * ((batch.length - 1) // segment) * states


def _gradients(config: MambaConfig, batch: MicroBatch) -> int:
    """What a layer's backward pass holds of gradients of its activations at once."""
    c, width, inner = batch.width_bytes, config.d_model, config.d_inner
    # Of the stream, of what the mixer gave, and of in_proj's output beside the parts of it.
    wide = 2 * inner if config.layer == "mamba1" else _in_proj_width(config)
    return (_FP32 * width + c * width + 2 * c * wide) * batch.tokens


def _head(config: MambaConfig, batch: MicroBatch) -> int:
    """The loss computes the gradients along with itself; the backward pass scales copies."""
    c, width, rows, tokens = (
        batch.width_bytes,
        config.d_model,
        config.padded_vocab_size,
        batch.tokens,
    )
    normed = (_FP32 + c) * width * tokens
    # On a GPU the tokens' gradient has their dtype.
    gradients = _FP32 * rows * width + (c if batch.on_gpu else _FP32) * width * tokens
    if batch.on_gpu:
        logits = min(_GPU_LOGITS_BYTES, c * rows * tokens)
        forward = gradients + logits + c * rows * width
    else:
        chunk = min(tokens, max(_CPU_LEAST_TOKENS, _CPU_LOGITS // config.vocab_size))
        cast = c * rows * width if batch.precision == "bf16" else 0
        forward = gradients + cast + chunk * config.vocab_size * (_FP32 + c)
    return normed + max(forward, 2 * gradients)


def _in_proj_width(config: MambaConfig) -> int:
    return config.d_inner + _conv_width(config) + config.n_heads


def _conv_width(config: MambaConfig) -> int:
    return config.d_inner + 2 * config.ngroups * config.d_state


def _x_proj_width(config: MambaConfig) -> int:
    return config.resolved_dt_rank + 2 * config.d_state
