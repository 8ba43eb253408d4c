"""The derived FLOPs against counted runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS, initialized, small_config, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.flops import flops_per_token, parameter_count
from mamba_dist.model.lm import MambaLM

PROJECTIONS = {"in_proj", "x_proj", "dt_proj", "out_proj", "lm_head"}
aten = torch.ops.aten

ONE_PER_RESULT = {
    aten.mul.Tensor, aten.add.Tensor, aten.exp.default, aten.softplus.default, aten.silu.default,
    aten.softplus_backward.default, aten.silu_backward.default, aten.neg.default,
}  # fmt: skip


class ElementwiseCounter(TorchDispatchMode):
    """Counts one FLOP per result of an elementwise operation and per summand of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ONE_PER_RESULT:
            self.flops += result.numel()
        elif func in (aten.sum.dim_IntList, aten.sum.default):
            self.flops += args[0].numel()
        return result


def scan_by_its_equation(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The selective scan of one row: u, delta, z (L, E), A (E, N), B, C (L, N), D, bias (E,)."""
    state, outputs = torch.zeros_like(A), []
    per_step = (t.unbind(0) for t in (u, delta, B, C, z))
    for u_t, delta_t, B_t, C_t, z_t in zip(*per_step, strict=True):
        step = F.softplus(delta_t + bias)
        state = torch.exp(step[:, None] * A) * state + (step * u_t)[:, None] * B_t
        outputs.append(((C_t * state).sum(-1) + D * u_t) * F.silu(z_t))
    return torch.stack(outputs)


def ssd_by_its_equation(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """SSD of one row and group: x (L, H, P), dt (L, H), A, D, bias (H,), B, C (L, N)."""
    state, outputs = torch.zeros(*x.shape[1:], B.shape[1]), []
    for x_t, dt_t, B_t, C_t in zip(
        x.unbind(0), dt.unbind(0), B.unbind(0), C.unbind(0), strict=True
    ):
        step = F.softplus(dt_t + bias)
        inflow = (step[:, None] * x_t)[..., None] * B_t
        state = torch.exp(step * A)[:, None, None] * state + inflow
        outputs.append((C_t * state).sum(-1) + D[:, None] * x_t)
    return torch.stack(outputs)


def counted(equation: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """Forward and backward FLOPs of an equation on random inputs of these shapes."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    with ElementwiseCounter() as forward:
        result = equation(*inputs)
    gradient = torch.ones_like(result)
    with ElementwiseCounter() as backward:
        torch.autograd.backward(result, gradient)
    return forward.flops, backward.flops


def derived(config: MambaConfig, names: set[str]) -> tuple[int, int]:
    chosen = [o for o in flops_per_token(config, sequence_length=1).operations if o.name in names]
    return sum(o.forward_flops for o in chosen), sum(o.backward_flops for o in chosen)


@pytest.mark.parametrize("layer", LAYERS)
def test_matrix_products_equal_a_counted_forward_and_backward(layer: str) -> None:
    config = small_config(layer, vocab_size=64)
    model = initialized(config)
    ids = tokens(2, 24)

    def counted_products(counter: FlopCounterMode) -> int:
        # The recurrence runs its own products as bmm; they are counted by its equation.
        by_operation = counter.get_flop_counts()["Global"]
        return int(by_operation.get(aten.mm, 0) + by_operation.get(aten.addmm, 0))

    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    expected_forward, expected_backward = derived(config, PROJECTIONS)
    assert counted_products(forward) == ids.numel() * expected_forward
    assert counted_products(backward) == ids.numel() * expected_backward


def test_the_selective_scan_equals_its_counted_equation() -> None:
    length, config = 30, small_config("mamba1", n_layers=1)
    channels, states = config.d_inner, config.d_state
    per_channel, per_state = (length, channels), (length, states)
    forward, backward = counted(
        scan_by_its_equation,
        per_channel, per_channel, (channels, states), per_state, per_state, (channels,),
        per_channel, (channels,),
    )  # fmt: skip
    expected_forward, expected_backward = derived(config, {"scan"})
    assert forward == length * expected_forward
    # The last step has no adjoint coming in, autograd adds up per step what a formula sums once.
    assert backward == pytest.approx(length * expected_backward, rel=0.03)


def test_ssd_equals_its_counted_equation() -> None:
    length, config = 30, small_config("mamba2", n_layers=1, ngroups=1)
    heads, width, states = config.n_heads, config.headdim, config.d_state
    forward, backward = counted(
        ssd_by_its_equation,
        (length, heads, width), (length, heads), (heads,), (length, states), (length, states),
        (heads,), (heads,),
    )  # fmt: skip
    expected_forward, expected_backward = derived(config, {"scan"})
    assert forward == length * expected_forward
    assert backward == pytest.approx(length * expected_backward, rel=0.03)


def test_the_convolution_counts_a_multiplication_and_an_addition_per_tap() -> None:
    config = small_config("mamba2", n_layers=3)
    # Convolved are x, and B and C of each group.
    channels = 96 + 2 * 2 * 8
    assert derived(config, {"conv1d"}) == (3 * 2 * 4 * channels, 3 * 4 * 4 * channels)


def test_a_token_of_the_130m_model_costs_about_six_flops_per_weight() -> None:
    config = MambaConfig(d_model=768, n_layers=24)
    cost = flops_per_token(config, sequence_length=2048)
    assert cost.total_flops == cost.forward_flops + cost.backward_flops
    assert 1.0 < cost.total_flops / (6 * parameter_count(config)) < 1.2


def test_the_scan_reads_its_parameters_once_per_sequence() -> None:
    config = MambaConfig(d_model=768, n_layers=1)
    short = flops_per_token(config, sequence_length=1)
    long = flops_per_token(config, sequence_length=2**20)
    inner, states = 1536, 16
    # u, delta, z in, y out, B and C, two bytes each.
    assert long.scan_forward_bytes == pytest.approx(2 * (4 * inner + 2 * states), rel=1e-4)
    parameters = 4 * (inner * states + 2 * inner)
    assert short.scan_forward_bytes - long.scan_forward_bytes == pytest.approx(parameters, rel=1e-4)
    assert long.scan_backward_bytes == pytest.approx(2 * (7 * inner + 4 * states), rel=1e-4)


@pytest.mark.parametrize(
    ("d_model", "n_layers", "parameters"),
    [
        (768, 24, 129_135_360),
        (1024, 48, 371_516_416),
        (1536, 48, 793_204_224),
        (2048, 48, 1_372_178_432),
        (2560, 64, 2_768_345_600),
    ],
    ids=["130m", "370m", "790m", "1.4b", "2.8b"],
)
def test_the_published_mamba1_shapes_have_their_published_size(
    d_model: int, n_layers: int, parameters: int
) -> None:
    config = MambaConfig(d_model=d_model, n_layers=n_layers)
    assert parameter_count(config) == parameters


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"proj_bias": True, "tie_embeddings": False}, {"conv_bias": False, "expand": 4}],
    ids=["plain", "biases", "wide"],
)
def test_the_parameter_count_equals_the_built_model(layer: str, changes: dict[str, Any]) -> None:
    config = small_config(layer, **changes)
    with torch.device("meta"):
        model = MambaLM(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_the_parameter_count_of_a_large_model_equals_the_built_one(layer: str) -> None:
    config = MambaConfig.model_validate({"layer": layer, "d_model": 768, "n_layers": 24})
    with torch.device("meta"):
        model = MambaLM(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
