"""Selective activation checkpointing: all but the scan is computed again, and no bit changes."""

import gc
import weakref
from typing import Any

import pytest
import torch
from small_models import LAYERS, perturbed, small_config, tokens
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mamba_dist.model.layers import CausalConv1d
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.kept_scan import KeptScan
from mamba_dist.ops.selective_scan import cpu as scan_cpu
from mamba_dist.ops.ssd import cpu as ssd_cpu

KERNELS = {"mamba1": scan_cpu, "mamba2": ssd_cpu}

every_backend = pytest.mark.parametrize("backend", ["cpu", "torch"])
every_layer = pytest.mark.parametrize("layer", LAYERS)


def model_of(layer: str, checkpointing: str, backend: str = "cpu") -> MambaLM:
    return perturbed(small_config(layer), backend=backend, activation_checkpointing=checkpointing)


def loss_of(model: MambaLM, *, length: int = 40, autocast: bool = False) -> Tensor:
    ids = tokens(2, length)
    seq_idx = (torch.arange(length) >= 11).int().expand(2, length).contiguous()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = model(ids, labels=ids, seq_idx=seq_idx)
    return loss


def gradients_of(model: MambaLM) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters()]
    return [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KeptScan]]:
    """Every KeptScan that the test makes."""
    made: list[weakref.ref[KeptScan]] = []
    create = KeptScan.__init__

    def remember(self: KeptScan) -> None:
        create(self)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KeptScan, "__init__", remember)
    return made


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@every_backend
@every_layer
def test_no_bit_changes(layer: str, backend: str, autocast: bool) -> None:
    results = []
    for checkpointing in ("none", "selective"):
        model = model_of(layer, checkpointing, backend)
        loss = loss_of(model, autocast=autocast)
        loss.backward()
        results.append([loss.detach(), *gradients_of(model)])
    assert len(results[1]) == 1 + len(list(model.parameters()))
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


@every_layer
def test_the_convolution_runs_twice_and_the_scan_once(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        run = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return run(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(KERNELS[layer], "_run_forward")
    count(CausalConv1d, "forward")
    loss_of(model_of(layer, "selective")).backward()
    # Of two layers.
    assert calls == {"_run_forward": 2, "forward": 4}


def bytes_left_by_a_forward(model: MambaLM) -> int:
    loss_of(model).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = loss_of(model, length=200)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


@every_layer
def test_what_is_computed_again_takes_no_memory_until_the_backward(layer: str) -> None:
    plain, selective = (
        bytes_left_by_a_forward(model_of(layer, checkpointing))
        for checkpointing in ("none", "selective")
    )
    config = small_config(layer)
    # In both of two layers: the convolution's output, and in Mamba-1 the step sizes.
    spared = 2 * config.d_inner if layer == "mamba1" else config.d_inner + 4 * config.d_state
    assert plain - selective >= 2 * (2 * 200) * 4 * spared


@every_backend
@every_layer
def test_a_second_backward_of_one_forward_gives_the_same(layer: str, backend: str) -> None:
    model = model_of(layer, "selective", backend)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = gradients_of(model)
    model.zero_grad()
    loss.backward()
    assert all(
        torch.equal(once, twice) for once, twice in zip(first, gradients_of(model), strict=True)
    )


@pytest.mark.parametrize("with_backward", [True, False])
@every_layer
def test_what_is_kept_is_gone_with_the_graph(
    layer: str, with_backward: bool, kept: list[weakref.ref[KeptScan]]
) -> None:
    model = model_of(layer, "selective")
    # Reference counts alone have to do it: a cycle would stay until the collector's next turn.
    gc.disable()
    try:
        loss = loss_of(model)
        alive = [reference() is not None for reference in kept]
        if with_backward:
            loss.backward()
        else:
            del loss
        left = [reference() for reference in kept]
    finally:
        gc.enable()
    assert alive == [True, True]
    assert left == [None, None]


@every_layer
def test_evaluation_and_generation_keep_nothing(
    layer: str, kept: list[weakref.ref[KeptScan]]
) -> None:
    model = model_of(layer, "selective")
    with torch.no_grad():
        evaluated = loss_of(model)
    _, states = model.forward_with_state(tokens(1, 5))
    assert len(states) == 2
    assert not kept
    assert torch.equal(evaluated, loss_of(model_of(layer, "none")).detach())
