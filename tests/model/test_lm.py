import pytest
import torch
import torch.nn.functional as F
from small_models import LAYERS, initialized, perturbed, small_config, tokens
from torch import Tensor

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model import mamba1, mamba2
from mamba_dist.model.block import Block
from mamba_dist.model.lm import MambaLM


@pytest.mark.parametrize("window", [1, 3, 17])
@pytest.mark.parametrize("layer", LAYERS)
def test_windows_chained_by_their_state_give_the_logits_of_the_whole(
    layer: str, window: int
) -> None:
    model = perturbed(small_config(layer))
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = model(ids)
        states, found = None, []
        for part in ids.split(window, dim=1):
            logits, states = model.forward_with_state(part, states)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_flow_through_the_state_between_windows(layer: str) -> None:
    whole, chained = perturbed(small_config(layer)), perturbed(small_config(layer))
    ids = tokens(1, 30)
    whole(ids)[:, -1, :61].sum().backward()
    _, states = chained.forward_with_state(ids[:, :12])
    chained.forward_with_state(ids[:, 12:], states)[0][:, -1, :61].sum().backward()
    for (name, parameter), other in zip(
        whole.named_parameters(), chained.parameters(), strict=True
    ):
        assert parameter.grad is not None
        assert other.grad is not None
        error = (parameter.grad - other.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_a_state_belongs_to_the_first_document_of_a_row() -> None:
    model = perturbed(small_config("mamba1"))
    _, states = model.forward_with_state(tokens(1, 9, seed=3))
    ids, seq_idx = tokens(1, 12), (torch.arange(12) >= 5).int()[None]
    with torch.no_grad():
        logits, _ = model.forward_with_state(ids, states, seq_idx=seq_idx)
        continued, _ = model.forward_with_state(ids[:, :5], states)
        fresh = model(ids[:, 5:])
    expected = torch.cat([continued, fresh], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_last_logits_alone_equal_the_last_of_all() -> None:
    model = perturbed(small_config("mamba1"))
    ids = tokens(2, 9)
    with torch.no_grad():
        last, _ = model.forward_with_state(ids, last_only=True)
    torch.testing.assert_close(last, model(ids)[:, -1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_loss_is_the_sum_over_real_labels_and_real_ids(layer: str) -> None:
    model = perturbed(small_config(layer))
    ids, labels = tokens(2, 20), tokens(2, 20, seed=1)
    labels[:, ::3] = -100
    logits = model(ids)[..., :61].flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    loss = model(ids, labels=labels)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_padding_ids_have_no_probability_and_no_gradient() -> None:
    model = perturbed(small_config("mamba1"))
    ids = tokens(2, 20)
    probabilities = model(ids).softmax(-1)
    assert probabilities.shape[-1] == 64
    assert not probabilities[..., 61:].any()
    model(ids, labels=ids).backward()
    weight = model.backbone.embedding.weight
    assert weight.grad is not None
    assert not weight.grad[61:].any()


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_shares_the_embedding_only_if_tied(tie: bool) -> None:
    model = MambaLM(small_config("mamba1", tie_embeddings=tie))
    assert (model.lm_head.weight is model.backbone.embedding.weight) is tie
    assert ("lm_head.weight" in dict(model.named_parameters())) is not tie


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_activation_checkpointing_changes_no_bit(layer: str, autocast: bool) -> None:
    config = small_config(layer)
    ids = tokens(2, 40)
    seq_idx = (torch.arange(40) >= 11).int().expand(2, 40).contiguous()
    results = []
    for checkpointing in ("none", "full"):
        model = perturbed(config, activation_checkpointing=checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, seq_idx=seq_idx)
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    for gradient, again in zip(gradients, gradients_again, strict=True):
        assert gradient is not None
        assert again is not None
        assert torch.equal(gradient, again)


def test_full_activation_checkpointing_runs_each_block_again_in_the_backward_pass() -> None:
    runs = {}
    for checkpointing in ("none", "selective", "full"):
        model = perturbed(small_config("mamba1"), activation_checkpointing=checkpointing)
        calls: list[Block] = []
        for block in model.backbone.layers:
            block.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        model(tokens(1, 8), labels=tokens(1, 8)).backward()
        runs[checkpointing] = len(calls)
    assert runs == {"none": 2, "selective": 2, "full": 4}


@pytest.mark.parametrize("layer", LAYERS)
def test_under_autocast_the_recurrence_gets_its_parameters_in_fp32(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = (mamba1, "selective_scan") if layer == "mamba1" else (mamba2, "ssd")
    op = getattr(module, name)
    seen: list[tuple[Tensor, ...]] = []

    def spy(*arguments: Tensor, **options: object) -> object:
        seen.append(arguments)
        assert options["A_is_log"]
        return op(*arguments, **options)

    monkeypatch.setattr(module, name, spy)
    model = perturbed(small_config(layer, n_layers=2))
    streams: list[torch.dtype] = []
    for block in model.backbone.layers:
        block.register_forward_hook(lambda *a: streams.append(a[2][1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 8))

    x, raw_dt, A_log, _, _, D, _, dt_bias = seen[0][:8]
    mixer = model.backbone.layers[0].mixer
    bias = mixer.dt_proj.bias if layer == "mamba1" else mixer.dt_bias
    assert x.dtype == raw_dt.dtype == torch.bfloat16
    assert A_log.dtype == torch.float32
    assert torch.equal(A_log, mixer.A_log)
    assert torch.equal(D, mixer.D)
    assert torch.equal(dt_bias, bias)
    assert streams == [torch.float32, torch.float32]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layer", LAYERS)
def test_bf16_stays_close_to_fp32(layer: str) -> None:
    model = initialized(small_config(layer, n_layers=4))
    ids = tokens(2, 100)
    with torch.no_grad():
        expected = model(ids, labels=ids)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids, labels=ids)
    assert found.dtype == torch.float32
    assert abs(found - expected) / expected < 2e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_in_fp64_computes_in_fp64(layer: str) -> None:
    config, ids = small_config(layer), tokens(1, 30)
    torch_model, reference = (perturbed(config, backend=b).double() for b in ("torch", "reference"))
    with torch.no_grad():
        logits, expected = torch_model(ids), reference(ids)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_reference_backend_gives_the_same_loss(layer: str) -> None:
    config = small_config(layer)
    ids = tokens(1, 30)
    losses = [perturbed(config, backend=b)(ids, labels=ids) for b in ("torch", "reference")]
    torch.testing.assert_close(losses[0], losses[1])


def test_construction_reads_and_writes_no_values() -> None:
    for config in (small_config("mamba1", proj_bias=True), small_config("mamba2")):
        with torch.device("meta"):
            model = MambaLM(config)
        assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    before = torch.random.get_rng_state()
    MambaLM(small_config("mamba1"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_parameter_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    with torch.device("meta"):
        model = MambaLM(MambaConfig(d_model=768, n_layers=24))
    layer = "backbone.layers.23."
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(layer)}
    assert shapes == {
        layer + "norm.weight": (768,),
        layer + "mixer.in_proj.weight": (3072, 768),
        layer + "mixer.conv1d.weight": (1536, 1, 4),
        layer + "mixer.conv1d.bias": (1536,),
        layer + "mixer.x_proj.weight": (80, 1536),
        layer + "mixer.dt_proj.weight": (1536, 48),
        layer + "mixer.dt_proj.bias": (1536,),
        layer + "mixer.A_log": (1536, 16),
        layer + "mixer.D": (1536,),
        layer + "mixer.out_proj.weight": (768, 1536),
    }
    others = {n: tuple(p.shape) for n, p in model.named_parameters() if ".layers." not in n}
    assert others == {"backbone.embedding.weight": (50280, 768), "backbone.norm_f.weight": (768,)}
