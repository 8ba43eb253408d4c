"""Recorded micro-batches: on a CPU through a stand-in for the recording, on a GPU for real."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recording import Stand
from torch import Tensor, nn

from mamba_dist.config.schema import ActivationCheckpointing, MambaConfig
from mamba_dist.engine.graph import RecordedMicrosteps, Recorder
from mamba_dist.errors import EngineError
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.cuda_graph import record

SCALE = 1 / 64
STEPS = 3


def small_model(
    layer: str, *, device: str, checkpointing: ActivationCheckpointing = "none"
) -> MambaLM:
    config = MambaConfig(
        layer=layer, d_model=64, n_layers=2, vocab_size=61, d_state=16, headdim=16, chunk_size=64,
        pad_vocab_size_multiple=64,
    )  # fmt: skip
    with torch.device(device):
        model = MambaLM(
            config,
            backend="torch" if device == "cpu" else "gpu",
            activation_checkpointing=checkpointing,
        )
    initialize(model, config, seed=0, gather=lambda _: nullcontext())
    return model


def micro_batch(seed: int) -> dict[str, Tensor]:
    """(2, 64) with documents of its own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (2, 65), generator=generator)
    starts = torch.rand(2, 64, generator=generator) < 0.1
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "seq_idx": starts.cumsum(1).to(torch.int32),
    }


def trained(
    model: MambaLM, *, recorder: Recorder | None, accumulation: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of some steps of SGD, and the parameters after them."""
    parameters = list(model.parameters())
    device = parameters[0].device

    def loss_sum(inputs: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss: Tensor = model(**inputs)
        return loss

    microsteps = (
        RecordedMicrosteps(loss_sum, parameters=parameters, recorder=recorder) if recorder else None
    )
    losses = []
    for step in range(STEPS):
        for micro in range(accumulation):
            inputs = micro_batch(step * accumulation + micro)
            if microsteps is None:
                loss = loss_sum({name: value.to(device) for name, value in inputs.items()})
                (loss * (SCALE / (1 + micro))).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            else:
                losses.append(microsteps(inputs, scale=SCALE / (1 + micro)))
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return losses, [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_recorded_micro_batches_train_as_others_do(layer: str, accumulation: int) -> None:
    model = small_model(layer, device="cpu")
    stand = Stand(list(model.parameters()))
    found = trained(model, recorder=stand, accumulation=accumulation)
    expected = trained(small_model(layer, device="cpu"), recorder=None, accumulation=accumulation)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert stand.recorded == min(accumulation, 2)


def test_losses_are_not_overwritten_by_the_next_micro_batch() -> None:
    model = small_model("mamba1", device="cpu")
    parameters = list(model.parameters())
    microsteps = RecordedMicrosteps(
        lambda inputs: model(**inputs), parameters=parameters, recorder=Stand(parameters)
    )
    first = microsteps(micro_batch(0), scale=SCALE)
    value = float(first)
    microsteps(micro_batch(1), scale=SCALE)
    assert float(first) == value


def test_inputs_of_another_shape_are_refused() -> None:
    model = small_model("mamba1", device="cpu")
    parameters = list(model.parameters())
    microsteps = RecordedMicrosteps(
        lambda inputs: model(**inputs), parameters=parameters, recorder=Stand(parameters)
    )
    microsteps(micro_batch(0), scale=SCALE)
    shorter = {name: value[:, :32] for name, value in micro_batch(0).items()}
    with pytest.raises(ValueError, match="recorded for inputs of"):
        microsteps(shorter, scale=SCALE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_graphs_train_as_single_launches_do(
    layer: str, checkpointing: ActivationCheckpointing, accumulation: int
) -> None:
    found, expected = (
        trained(
            small_model(layer, device="cuda", checkpointing=checkpointing),
            recorder=recorder,
            accumulation=accumulation,
        )
        for recorder in (record, None)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_waits_for_the_device_is_refused_with_a_way_out() -> None:
    weight = nn.Parameter(torch.ones(4, device="cuda"))

    def waiting(inputs: Any) -> Tensor:
        return weight.sum() * float(inputs["input_ids"].sum())

    microsteps = RecordedMicrosteps(waiting, parameters=[weight])
    with pytest.raises(EngineError, match=r"engine\.cuda_graphs"):
        microsteps(micro_batch(0), scale=SCALE)
