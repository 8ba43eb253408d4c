import pytest
import torch
from small_models import initialized, small_config, tokens

from mamba_dist.errors import ModelError
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.weights import load_parameters


def test_a_loaded_model_computes_what_the_saved_one_did() -> None:
    saved = initialized(small_config("mamba2"))
    loaded = MambaLM(small_config("mamba2"))
    load_parameters(loaded, {n: p.detach().clone() for n, p in saved.named_parameters()})
    assert torch.equal(saved(tokens(1, 9)), loaded(tokens(1, 9)))


def test_every_difference_is_named_and_nothing_is_copied() -> None:
    model = initialized(small_config("mamba1"))
    before = [p.detach().clone() for p in model.parameters()]
    tensors = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    del tensors["backbone.norm_f.weight"]
    tensors["lm_head.weight"] = torch.zeros(64, 48)
    tensors["backbone.layers.0.mixer.D"] = torch.zeros(95)
    with pytest.raises(ModelError) as caught:
        load_parameters(model, tensors)
    message = str(caught.value)
    assert "backbone.norm_f.weight is missing" in message
    assert "lm_head.weight is not in this model" in message
    assert "backbone.layers.0.mixer.D has shape (95,), expected (96,)" in message
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_long_list_of_differences_is_cut() -> None:
    with pytest.raises(ModelError, match="and 17 more"):
        load_parameters(MambaLM(small_config("mamba1")), {})
