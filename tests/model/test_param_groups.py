import pytest
import torch
from small_models import LAYERS, small_config
from torch import nn

from mamba_dist.errors import ModelError
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import classify, format_table


def decaying(layer: str) -> set[str]:
    model = MambaLM(small_config(layer, n_layers=1, proj_bias=True, tie_embeddings=False))
    classes = classify(model)
    assert [c.name for c in classes] == [name for name, _ in model.named_parameters()]
    return {c.name.removeprefix("backbone.layers.0.mixer.") for c in classes if c.decay}


def test_only_the_matrices_of_mamba1_decay() -> None:
    matrices = {f"{m}.weight" for m in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert decaying("mamba1") == matrices | {"lm_head.weight"}


def test_only_the_matrices_of_mamba2_decay() -> None:
    matrices = {f"{m}.weight" for m in ("in_proj", "conv1d", "out_proj")}
    assert decaying("mamba2") == matrices | {"lm_head.weight"}


@pytest.mark.parametrize("layer", LAYERS)
def test_an_unknown_parameter_is_refused_by_name(layer: str) -> None:
    model = MambaLM(small_config(layer))
    model.backbone.layers[1].mixer.gate_scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ModelError, match=r"backbone\.layers\.1\.mixer\.gate_scale matches 0"):
        classify(model)


def test_a_wrapped_model_is_refused_since_its_names_differ() -> None:
    with pytest.raises(ModelError, match=r"0\.backbone\.embedding\.weight"):
        classify(nn.Sequential(MambaLM(small_config("mamba1"))))


def test_the_table_has_a_line_per_parameter_and_counts_every_element() -> None:
    model = MambaLM(small_config("mamba2"))
    classes = classify(model)
    lines = format_table(classes).splitlines()
    assert len(lines) == 1 + len(classes) + 2
    assert all(line.startswith(c.name) for line, c in zip(lines[1:], classes, strict=False))
    counts = [int(line.split()[-2].replace(",", "")) for line in lines[-2:]]
    assert sum(counts) == sum(p.numel() for p in model.parameters())


def test_the_record_tells_shape_precision_and_initial_values() -> None:
    model = MambaLM(small_config("mamba1"))
    model.backbone.layers[0].mixer.D.data = model.backbone.layers[0].mixer.D.data.bfloat16()
    record = {c.name: c for c in classify(model)}["backbone.layers.0.mixer.D"]
    assert (record.shape, record.fp32, record.init) == ((96,), False, "1")
