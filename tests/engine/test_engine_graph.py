"""Recorded micro-batches: on a CPU through a stand-in for the recording, on a GPU for real."""

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from recording import TapeRecorder
from torch import Tensor, nn

from mamba_dist.config.schema import ActivationCheckpointing, MambaConfig
from mamba_dist.engine.graph import RecordedMicrosteps, Recorder
from mamba_dist.errors import EngineError
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.cuda_graph import CudaRecorder

SCALE = 1 / 64
STEPS = 3
WAITING_STEP = """
import torch
from torch import nn
from mamba_dist.engine.graph import RecordedMicrosteps
from mamba_dist.ops.cuda_graph import CudaRecorder
weight = nn.Parameter(torch.ones(4, device="cuda"))
microsteps = RecordedMicrosteps(
    lambda inputs: weight.sum() * float(inputs["x"].sum()),
    parameters=[weight],
    recorder=CudaRecorder(weight.device),
)
microsteps({"x": torch.ones(4)}, scale=1.0)
"""


class BagOfWords(nn.Module):
    """Embedding and head share a weight; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(61, 8, generator=generator))
        self.bias = nn.Parameter(torch.zeros(61))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, input_ids: Tensor, labels: Tensor, seq_idx: Tensor) -> Tensor:
        hidden = torch.tanh(self.weight[input_ids]) * (1 + seq_idx[..., None])
        logits = hidden @ self.weight.T + self.bias
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def small_model(layer: str, checkpointing: ActivationCheckpointing) -> MambaLM:
    config = MambaConfig(
        layer=layer, d_model=64, n_layers=2, vocab_size=61, d_state=16, headdim=16, chunk_size=64,
        pad_vocab_size_multiple=64,
    )  # fmt: skip
    with torch.device("cuda"):
        model = MambaLM(config, backend="gpu", activation_checkpointing=checkpointing)
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
    model: nn.Module, *, recorder: Recorder | None, accumulation: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of some steps of SGD, of so many micro-batches each, and the parameters then."""
    parameters = list(model.parameters())
    device = parameters[0].device

    def loss_sum(inputs: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss: Tensor = model(**inputs)
        return loss

    microsteps = (
        RecordedMicrosteps(loss_sum, parameters=parameters, recorder=recorder) if recorder else None
    )
    losses: list[Tensor] = []
    for count in accumulation:
        for micro in range(count):
            inputs, scale = micro_batch(len(losses)), SCALE / (1 + micro)
            if microsteps is None:
                loss = loss_sum({name: value.to(device) for name, value in inputs.items()})
                (loss * scale).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            else:
                losses.append(microsteps(inputs, scale=scale))
        with torch.no_grad():
            # As an evaluation or a checkpoint would, memory is taken and given back in between.
            torch.full((1 << 16,), float("nan"), device=device)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    return losses, [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("accumulation", [(1, 1, 1), (3, 3), (1, 3, 2, 1)])
def test_recorded_micro_batches_train_as_others_do(accumulation: tuple[int, ...]) -> None:
    recorder = TapeRecorder()
    found = trained(BagOfWords(), recorder=recorder, accumulation=accumulation)
    expected = trained(BagOfWords(), recorder=None, accumulation=accumulation)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert recorder.recorded == (1 if max(accumulation) == 1 else 2)


def recorded_bag() -> tuple[BagOfWords, RecordedMicrosteps]:
    model = BagOfWords()
    microsteps = RecordedMicrosteps(
        lambda inputs: model(**inputs), parameters=list(model.parameters()), recorder=TapeRecorder()
    )
    return model, microsteps


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.zeros(2, 32, dtype=torch.int64)},
        {"labels": torch.zeros(2, 64)},
        {"extra": torch.zeros(2, 64)},
    ],
)
def test_inputs_of_another_kind_are_refused(change: dict[str, Tensor]) -> None:
    _, microsteps = recorded_bag()
    microsteps(micro_batch(0), scale=SCALE)
    with pytest.raises(ValueError, match="recorded for inputs"):
        microsteps({**micro_batch(0), **change}, scale=SCALE)


def test_missing_inputs_are_refused() -> None:
    _, microsteps = recorded_bag()
    microsteps(micro_batch(0), scale=SCALE)
    inputs = micro_batch(0)
    del inputs["seq_idx"]
    with pytest.raises(ValueError, match="recorded for inputs"):
        microsteps(inputs, scale=SCALE)


def test_gradients_that_are_no_longer_the_recorded_ones_are_refused() -> None:
    model, microsteps = recorded_bag()
    microsteps(micro_batch(0), scale=SCALE)
    assert model.bias.grad is not None
    model.bias.grad = model.bias.grad.clone()
    with pytest.raises(ValueError, match="not the tensors that the graphs write to"):
        microsteps(micro_batch(1), scale=SCALE)
    model.bias.grad = None
    with pytest.raises(ValueError, match="not the tensors that the graphs write to"):
        microsteps(micro_batch(1), scale=SCALE)


def test_a_model_that_reads_from_the_device_is_refused_with_a_way_out() -> None:
    weight = nn.Parameter(torch.ones(4))
    microsteps = RecordedMicrosteps(
        lambda inputs: weight.sum() * float(inputs["x"].sum()),
        parameters=[weight],
        recorder=TapeRecorder(),
    )
    with pytest.raises(EngineError, match=r"engine\.cuda_graphs"):
        microsteps({"x": torch.ones(4)}, scale=1.0)


def test_what_fails_without_a_graph_too_is_told_as_it_is() -> None:
    weight = nn.Parameter(torch.ones(4))
    microsteps = RecordedMicrosteps(
        lambda inputs: (weight * inputs["x"]).sum(), parameters=[weight], recorder=TapeRecorder()
    )
    with pytest.raises(RuntimeError, match="size of tensor"):
        microsteps({"x": torch.ones(3)}, scale=1.0)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("accumulation", [(1, 1, 1), (3, 1, 3)])
def test_graphs_train_as_single_launches_do(
    layer: str, checkpointing: ActivationCheckpointing, accumulation: tuple[int, ...]
) -> None:
    found, expected = (
        trained(small_model(layer, checkpointing), recorder=recorder, accumulation=accumulation)
        for recorder in (CudaRecorder(torch.device("cuda", 0)), None)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@on_gpu
def test_the_graph_that_adds_works_in_the_memory_of_the_one_that_sets() -> None:
    weight = nn.Parameter(torch.ones(1 << 20, device="cuda"))
    taken = []
    for count in (1, 2):
        microsteps = RecordedMicrosteps(
            lambda inputs: torch.tanh(torch.tanh(inputs["x"] * weight)).sum(),
            parameters=[weight],
            recorder=CudaRecorder(weight.device),
        )
        weight.grad = None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(count):
            microsteps({"x": torch.ones(64, 1 << 20)}, scale=1.0)
        taken.append(torch.cuda.memory_reserved() - before)
    # 256 MiB each of inputs and of two activations at least.
    assert taken[0] > 3 << 28
    # The gradient that the first graph has left splits one of its blocks, which is replaced; all
    # three would be, if the graphs did not share their memory.
    assert taken[1] - taken[0] < 1.5 * (1 << 28)


@pytest.mark.gpu
@on_gpu
def test_a_real_graph_of_a_model_that_waits_is_refused_with_a_way_out() -> None:
    # In a process of its own, since it can use the device no more.
    process = subprocess.run(
        [sys.executable, "-c", WAITING_STEP], capture_output=True, text=True, check=False
    )
    assert "EngineError" in process.stderr
    assert "engine.cuda_graphs" in process.stderr
