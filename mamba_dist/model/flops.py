"""Work per token, derived from the config operation by operation; the basis of MFU.

Counted: matrix products (2 per weight and token forward, twice that backward), convolution, scan,
head. Left out: norms, residual additions and Mamba-2's gate, under one percent together.
Nothing is quadratic in the length. One FLOP is one multiplication, addition or elementary function.

The recurrence counts as the paper's equation, whichever algorithm runs: SSD in longer chunks
executes more FLOPs for the same result, recomputation executes them twice; neither raises MFU.

D d_model, E d_inner, N d_state, R dt_rank, H heads, G groups, K d_conv, V vocabulary, L length.
"""

from dataclasses import dataclass

from mamba_dist.config.schema import MambaConfig

_FP32_BYTES = 4


@dataclass(frozen=True)
class Operation:
    """FLOPs per token of one kind of operation, over all layers."""

    name: str
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class TokenCost:
    """What one token costs: FLOPs by operation, and bytes that the scan must move, over all layers.

    The bytes are a lower bound: each input read once, each output written once, activations in
    `activation_bytes` each, states kept on chip.
    """

    operations: tuple[Operation, ...]
    scan_forward_bytes: float
    scan_backward_bytes: float

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass per token."""
        return sum(operation.forward_flops for operation in self.operations)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass per token."""
        return sum(operation.backward_flops for operation in self.operations)

    @property
    def total_flops(self) -> int:
        """FLOPs of a training step per token."""
        return self.forward_flops + self.backward_flops


def flops_per_token(
    config: MambaConfig, *, sequence_length: int, activation_bytes: int = 2
) -> TokenCost:
    """FLOPs per token of forward and backward, and the scan's traffic in bytes per token.

    FLOPs do not depend on `sequence_length` (in tokens); the scan reads its parameters once per
    sequence.
    """
    layers = config.n_layers
    operations = [
        Operation(name, layers * 2 * weights, layers * 4 * weights)
        for name, weights in projection_weights(config).items()
    ]
    taps = _conv_channels(config) * config.d_conv
    operations.append(Operation("conv1d", layers * 2 * taps, layers * 4 * taps))
    forward, backward = _recurrence_flops(config)
    operations.append(Operation("scan", layers * forward, layers * backward))
    head = config.d_model * config.vocab_size
    operations.append(Operation("lm_head", 2 * head, 4 * head))
    forward_bytes, backward_bytes = _scan_bytes(config, sequence_length, activation_bytes)
    return TokenCost(tuple(operations), layers * forward_bytes, layers * backward_bytes)


def parameter_count(config: MambaConfig) -> int:
    """Elements of all parameters, vocabulary padding included, tied weights once."""
    embeddings = 1 if config.tie_embeddings else 2
    vocabulary = embeddings * config.padded_vocab_size * config.d_model
    return config.n_layers * layer_parameters(config) + config.d_model + vocabulary


def layer_parameters(config: MambaConfig) -> int:
    """Elements of the parameters of one layer, its norm included."""
    width, inner = config.d_model, config.d_inner
    channels = _conv_channels(config)
    projections = projection_weights(config)
    mixer = sum(projections.values()) + channels * config.d_conv
    mixer += channels if config.conv_bias else 0
    mixer += projections["in_proj"] // width + width if config.proj_bias else 0
    if config.layer == "mamba1":
        mixer += inner * config.d_state + 2 * inner  # A_log; D and dt_proj.bias
    else:
        mixer += 3 * config.n_heads + inner  # A_log, D and dt_bias; norm
    return mixer + width


def projection_weights(config: MambaConfig) -> dict[str, int]:
    """Elements of the weights of each matrix product in a mixer."""
    width, inner, d_state = config.d_model, config.d_inner, config.d_state
    if config.layer == "mamba1":
        rank = config.resolved_dt_rank
        return {
            "in_proj": width * 2 * inner,
            "x_proj": inner * (rank + 2 * d_state),
            "dt_proj": rank * inner,
            "out_proj": inner * width,
        }
    columns = 2 * inner + 2 * config.ngroups * d_state + config.n_heads
    return {"in_proj": width * columns, "out_proj": inner * width}


def _conv_channels(config: MambaConfig) -> int:
    shared = 2 * config.ngroups * config.d_state if config.layer == "mamba2" else 0
    return config.d_inner + shared


def _recurrence_flops(config: MambaConfig) -> tuple[int, int]:
    """Forward and backward FLOPs of one layer's recurrence per token, gradients counted by hand."""
    inner, states, heads = config.d_inner, config.d_inner * config.d_state, config.n_heads
    if config.layer == "mamba1":
        # Forward, per state: delta A, exp, (delta u) B, decay h, their sum, C h, sum over N.
        # Per channel: bias, softplus, delta u, D u and its sum, silu(z) and its product.
        # Backward, per state: adjoint 3 (g C, carry, decay carry), gradients of C, B and delta u 2
        # each, of the exponent 2, of delta and A 2 each. Per channel: gate 3, D 4, delta u 3,
        # softplus, bias.
        return 7 * states + 7 * inner, 15 * states + 12 * inner
    # Forward, per state: (dt x) B, decay h, their sum, C h, sum over N. Per channel: dt x, D x and
    # its sum. Per head: bias, softplus, dt A, exp.
    # Backward, per state: adjoint 3, gradients of C, B and dt x 2 each, of the decay 2. Per
    # channel: D 4, dt x 3. Per head: exp, gradients of dt and A 2 each, softplus, bias.
    return 5 * states + 3 * inner + 4 * heads, 11 * states + 7 * inner + 7 * heads


def _scan_bytes(
    config: MambaConfig, sequence_length: int, activation_bytes: int
) -> tuple[float, float]:
    """Bytes of one layer per token: activations, and parameters once per sequence."""
    inner, d_state = config.d_inner, config.d_state
    if config.layer == "mamba1":
        channels_in, shared = 3 * inner, 2 * d_state  # u, delta, z; B, C
        parameters = inner * (d_state + 2)
    else:
        channels_in, shared = inner + config.n_heads, 2 * config.ngroups * d_state  # x, dt; B, C
        parameters = 3 * config.n_heads
    once = parameters * _FP32_BYTES / sequence_length
    forward = activation_bytes * (channels_in + shared + inner) + once
    # The backward reads the inputs and dy, and writes a gradient for each input and parameter.
    backward = activation_bytes * (2 * (channels_in + shared) + inner) + 2 * once
    return forward, backward
