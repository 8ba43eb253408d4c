"""The shipped configs: published shapes and recipes, and the size that each file promises."""

import math
from pathlib import Path

import pytest
import torch

from mamba_dist.config import MambaConfig, batch_plan, load_config
from mamba_dist.model.lm import MambaLM

CONFIGS = Path(__file__).parents[2] / "configs"

# d_model, layers, parameters, peak rate, 2^19 tokens per step, ZeRO stage, checkpointing.
# Shapes: config.json of state-spaces/mamba-{130m,370m,790m,1.4b,2.8b}, mamba2-{130m,...,2.7b}.
# Rates: 5 times GPT-3 (arXiv 2312.00752 E.2.1, 2405.21060 D.2 and D.3); mamba-2.8b 3 times.
PUBLISHED = {
    "130m": (768, 24, 129_135_360, 3e-3, 1, 0, "none"),
    "370m": (1024, 48, 371_516_416, 1.5e-3, 1, 0, "none"),
    "790m": (1536, 48, 793_204_224, 1.25e-3, 1, 0, "full"),
    "1b": (2048, 48, 1_372_178_432, 1e-3, 2, 2, "full"),
    "2.8b": (2560, 64, 2_768_345_600, 4.8e-4, 2, 3, "full"),
    "130m-mamba2": (768, 24, 128_989_632, 3e-3, 1, 0, "none"),
    "370m-mamba2": (1024, 48, 368_346_624, 1.5e-3, 1, 0, "none"),
    "790m-mamba2": (1536, 48, 780_161_280, 1.25e-3, 1, 0, "full"),
    "1b-mamba2": (2048, 48, 1_343_757_312, 1e-3, 2, 2, "full"),
    "2.8b-mamba2": (2560, 64, 2_702_599_680, 8e-4, 2, 3, "full"),
}


def parameters_by_formula(c: MambaConfig) -> int:
    """Parameters of the published models, counted by hand: R dt rank, C convolution channels."""
    D, E, N, K = c.d_model, c.d_inner, c.d_state, c.d_conv
    if c.layer == "mamba1":
        R = math.ceil(D / 16)
        in_proj, x_proj, dt_proj = D * 2 * E, E * (R + 2 * N), R * E + E
        mixer = in_proj + (K + 1) * E + x_proj + dt_proj + E * N + E + E * D
    else:
        H, C = E // c.headdim, E + 2 * c.ngroups * N
        in_proj = D * (E + C + H)
        mixer = in_proj + (K + 1) * C + 3 * H + E + E * D
    return c.padded_vocab_size * D + c.n_layers * (mixer + D) + D


def test_every_shipped_config_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {*PUBLISHED, "quickstart"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_has_the_published_shape_and_recipe(name: str) -> None:
    d_model, n_layers, _, rate, half_million, stage, checkpointing = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.yaml").config
    model, training = config.model, config.training
    layer = "mamba2" if name.endswith("-mamba2") else "mamba1"
    assert (model.layer, model.d_model, model.n_layers) == (layer, d_model, n_layers)
    assert (model.d_conv, model.expand, model.vocab_size) == (4, 2, 50280)
    if layer == "mamba1":
        assert (model.d_state, model.padded_vocab_size) == (16, 50280)
    else:
        assert (model.d_state, model.padded_vocab_size) == (128, 50288)
        assert (model.headdim, model.ngroups, model.chunk_size) == (64, 1, 256)
    assert training.learning_rate == rate
    assert training.lr_schedule == "cosine"
    assert rate * training.min_lr_ratio == pytest.approx(1e-5, rel=1e-3)
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.95)
    assert (training.weight_decay, training.max_grad_norm) == (0.1, 1.0)
    assert config.data.sequence_length == 2048
    tokens_per_step = batch_plan(config, 8).global_batch_size * 2048
    assert tokens_per_step == half_million * 2**19
    assert training.max_tokens == 300 * 10**9
    steps = training.max_tokens / tokens_per_step
    assert training.warmup_steps == pytest.approx(steps / 10, rel=1e-3)
    assert (training.precision, training.activation_checkpointing) == ("bf16", checkpointing)
    assert (config.engine.zero_stage, config.engine.ops_backend) == (stage, "auto")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_builds_the_number_of_parameters_that_it_promises(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    promised = PUBLISHED[name][2]
    config = load_config(path).config.model
    with torch.device("meta"):
        model = MambaLM(config)
    assert sum(p.numel() for p in model.parameters()) == promised
    assert parameters_by_formula(config) == promised
    assert f"{promised:,} parameters" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_convolution_and_offsets_of_a_config_suit_the_cuda_kernels(name: str) -> None:
    load_config(CONFIGS / f"{name}.yaml", ["engine.ops_backend=cuda"])


def test_the_quickstart_runs_on_two_ranks_of_a_cpu() -> None:
    config = load_config(CONFIGS / "quickstart.yaml").config
    assert batch_plan(config, 2).accumulation_steps >= 1
    assert config.training.precision == "fp32"
    assert config.training.run_dir == "runs/quickstart"
    assert config.data.dataset_path == "data/quickstart/shards"
    assert config.data.tokenizer_path == "data/quickstart/tokenizer.json"
