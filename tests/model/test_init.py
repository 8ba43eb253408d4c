import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS, initialized, small_config, whole
from torch import Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import ModelError
from mamba_dist.model.init import audit, init_rule, initialize
from mamba_dist.model.lm import MambaLM

WIDE = {"d_model": 256, "n_layers": 4, "vocab_size": 1000, "proj_bias": True}


def values(model: MambaLM, ending: str) -> Tensor:
    """The parameters of that name in all layers, flattened."""
    found = [p.detach().flatten() for n, p in model.named_parameters() if n.endswith(ending)]
    assert found, ending
    return torch.cat(found)


def assert_uniform(sample: Tensor, bound: float) -> None:
    assert sample.abs().max() <= bound
    assert sample.abs().max() > 0.99 * bound
    assert abs(sample.mean()) < 0.02 * bound
    assert sample.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_mamba1_starts_with_the_published_distributions() -> None:
    model = initialized(small_config("mamba1", d_state=16, tie_embeddings=False, **WIDE))
    assert_uniform(values(model, "in_proj.weight"), 256**-0.5)
    assert_uniform(values(model, "x_proj.weight"), 512**-0.5)
    assert_uniform(values(model, "conv1d.weight"), 4**-0.5)
    assert_uniform(values(model, "conv1d.bias"), 4**-0.5)
    assert_uniform(values(model, "dt_proj.weight"), 16**-0.5)
    # Rescaled once, not once per enclosing module.
    assert_uniform(values(model, "out_proj.weight"), 512**-0.5 / math.sqrt(4))
    assert_uniform(values(model, "lm_head.weight"), 256**-0.5)
    assert values(model, "embedding.weight").std() == pytest.approx(0.02, rel=0.02)
    assert values(model, "A_log").view(-1, 16).exp().allclose(torch.arange(1.0, 17.0))
    for ones in (".D", "norm.weight", "norm_f.weight"):
        assert (values(model, ones) == 1).all()
    assert not values(model, "in_proj.bias").any()
    assert not values(model, "out_proj.bias").any()


def test_mamba2_starts_with_the_published_distributions() -> None:
    config = small_config("mamba2", **WIDE | {"headdim": 1, "expand": 4, "ngroups": 4})
    model = initialized(config)
    A = values(model, "A_log").exp()
    assert A.min() >= 1
    assert A.max() <= 16.00001
    assert A.mean() == pytest.approx(8.5, rel=0.02)
    assert A.std() == pytest.approx(15 / math.sqrt(12), rel=0.02)
    assert_uniform(values(model, "in_proj.weight"), 256**-0.5)
    assert (values(model, "mixer.norm.weight") == 1).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_initial_step_sizes_are_log_uniform(layer: str) -> None:
    changes = {"expand": 16, "dt_min": 1e-2, "dt_max": 0.5}
    model = initialized(
        small_config(layer, **changes | ({"headdim": 1} if layer == "mamba2" else {}))
    )
    dt = F.softplus(values(model, "dt_proj.bias" if layer == "mamba1" else "dt_bias"))
    assert dt.min() >= 0.0099999
    assert dt.max() <= 0.50001
    assert dt.log().mean() == pytest.approx((math.log(1e-2) + math.log(0.5)) / 2, rel=0.05)


def test_initial_step_sizes_do_not_fall_below_the_floor() -> None:
    config = small_config("mamba1", expand=16, dt_min=1e-5, dt_init_floor=1e-2)
    model = initialized(config)
    dt = F.softplus(values(model, "dt_proj.bias"))
    assert dt.min() == pytest.approx(1e-2, rel=1e-4)
    audit(model, config, gather=whole)


@pytest.mark.parametrize("layer", LAYERS)
def test_initialising_again_gives_the_same_bits(layer: str) -> None:
    config = small_config(layer)
    model = initialized(config, seed=3)
    first = [p.detach().clone() for p in model.parameters()]
    initialize(model, config, seed=3, gather=whole)
    assert all(torch.equal(a, b) for a, b in zip(first, model.parameters(), strict=True))


def test_a_parameter_starts_the_same_whatever_model_surrounds_it() -> None:
    small, large = (
        initialized(small_config("mamba1", n_layers=n, tie_embeddings=t))
        for n, t in ((2, True), (5, False))
    )
    of_large = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        if "out_proj" not in name:
            assert torch.equal(parameter, of_large[name]), name


def test_seeds_layers_and_names_differ_in_their_random_values() -> None:
    model = initialized(small_config("mamba1"))
    other = initialized(small_config("mamba1"), seed=1)
    first, second = (block.mixer.in_proj.weight for block in model.backbone.layers)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other.backbone.layers[0].mixer.in_proj.weight)


def test_parameters_are_written_and_audited_inside_the_gather_context_only() -> None:
    config = small_config("mamba1")
    model = MambaLM(config)
    full = {id(p): p.data for p in model.parameters()}

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = full[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    with gather(list(model.parameters())):
        pass
    initialize(model, config, seed=0, gather=gather)
    audit(model, config, gather=gather)
    expected = dict(initialized(config).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(full[id(parameter)], expected[name])


def test_a_model_without_storage_is_refused() -> None:
    config = small_config("mamba1")
    with torch.device("meta"):
        model = MambaLM(config)
    with pytest.raises(ModelError, match=r"backbone\.embedding\.weight is on the meta device"):
        initialize(model, config, seed=0, gather=whole)


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(ModelError, match=r"adapter\.weight has 0 initialisation rules"):
        init_rule("backbone.layers.0.adapter.weight")


def audited_configs() -> list[MambaConfig]:
    return [
        small_config("mamba1", proj_bias=True, tie_embeddings=False),
        small_config("mamba2", proj_bias=True),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_audit_accepts_every_sound_initialisation(seed: int) -> None:
    for config in audited_configs():
        audit(initialized(config, seed=seed), config, gather=whole)


def scaled(parameter: Tensor) -> None:
    parameter *= 1.5


def shifted(parameter: Tensor) -> None:
    parameter += 1.5


def one_nan(parameter: Tensor) -> None:
    parameter.view(-1)[3] = math.nan


def constant(parameter: Tensor) -> None:
    parameter.fill_(float(parameter.flatten()[0]) + 0.01)


@pytest.mark.parametrize("damage", [scaled, shifted, one_nan, constant])
@pytest.mark.parametrize("config", audited_configs(), ids=LAYERS)
def test_the_audit_names_every_kind_of_parameter_that_was_changed(
    config: MambaConfig, damage: Callable[[Tensor], None]
) -> None:
    model = initialized(config)
    for name, parameter in model.named_parameters():
        if damage is scaled and not parameter.any():
            continue  # Zeros stay zeros.
        before = parameter.detach().clone()
        with torch.no_grad():
            damage(parameter)
        with pytest.raises(ModelError, match=f"parameter {name} is not initialised"):
            audit(model, config, gather=whole)
        with torch.no_grad():
            parameter.copy_(before)
    audit(model, config, gather=whole)


def test_the_audit_finds_a_parameter_that_is_not_fp32() -> None:
    config = small_config("mamba1")
    model = initialized(config)
    model.backbone.layers[1].mixer.A_log.data = model.backbone.layers[1].mixer.A_log.data.bfloat16()
    with pytest.raises(
        ModelError, match=r"layers\.1\.mixer\.A_log .*bfloat16, expected torch.float32"
    ):
        audit(model, config, gather=whole)


def test_the_audit_finds_an_out_proj_that_was_rescaled_twice() -> None:
    config = small_config("mamba1")
    model = initialized(config)
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight /= math.sqrt(config.n_layers)
    with pytest.raises(
        ModelError, match=r"layers\.0\.mixer\.out_proj\.weight .*standard deviation"
    ):
        audit(model, config, gather=whole)
