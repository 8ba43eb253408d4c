"""The same weights give the same logits and gradients in Hugging Face's implementation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import perturbed, small_config, tokens
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaForCausalLM
from transformers import MambaConfig as HfMambaConfig

from mamba_dist.config.schema import MambaConfig


def theirs(config: MambaConfig) -> nn.Module:
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
        return MambaForCausalLM(HfMambaConfig(**shape))
    shape |= {
        "num_heads": config.n_heads,
        "head_dim": config.headdim,
        "n_groups": config.ngroups,
        "chunk_size": config.chunk_size,
    }
    return Mamba2ForCausalLM(Mamba2Config(**shape))


def their_name(name: str) -> str:
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def gradients(logits: Tensor, labels: Tensor, model: nn.Module) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config",
    [
        small_config("mamba1"),
        small_config("mamba1", proj_bias=True, tie_embeddings=False, d_conv=3, dt_rank=5),
        small_config("mamba1", conv_bias=False, expand=3, norm_eps=1e-3),
        small_config("mamba2", ngroups=1),
        small_config("mamba2", ngroups=2, proj_bias=True, tie_embeddings=False),
        small_config("mamba2", ngroups=3, conv_bias=False, norm_eps=1e-3),
    ],
    ids=["mamba1", "mamba1-biases", "mamba1-wide", "mamba2", "mamba2-biases", "mamba2-groups"],
)
@pytest.mark.parametrize("fused_loss", [False, True], ids=["logits", "loss"])
def test_logits_and_gradients_equal_hugging_face(config: MambaConfig, fused_loss: bool) -> None:
    ours, hf = perturbed(config), theirs(config)
    hf.load_state_dict(
        {their_name(name): p.detach().clone() for name, p in ours.named_parameters()},
        strict=not config.tie_embeddings,
    )
    hf.eval()
    assert {their_name(n) for n, _ in ours.named_parameters()} == dict(hf.named_parameters()).keys()
    # Their fifty steps include a length that no chunk divides.
    ids, labels = tokens(2, 50), tokens(2, 50, seed=1)
    expected_logits = hf(ids).logits[..., : config.vocab_size]
    expected = gradients(expected_logits, labels, hf)

    if fused_loss:
        ours(ids, labels).backward()
        found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    else:
        logits = ours(ids)[..., : config.vocab_size]
        torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
        found = gradients(logits, labels, ours)

    assert found.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in found.items():
        reference = expected[their_name(name)]
        error = (gradient - reference).norm() / reference.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"
