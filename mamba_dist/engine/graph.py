"""Forward and backward of a micro-batch as CUDA graphs: recorded once, launched as a whole.

A layer is some sixty kernels of a few microseconds each, and with activation checkpointing a third
more; unless the model or the micro-batch is large, a GPU finishes them sooner than Python can ask
for them. Parameters are updated in place and keep their addresses, so a graph sees each update.

The price: the memory of activations and gradients stays taken between micro-batches and steps.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mamba_dist.engine.base import scaled_loss
from mamba_dist.errors import EngineError

_WITHOUT = "set engine.cuda_graphs: false"


class Recorder(Protocol):
    """What records, see `mamba_dist.ops.cuda_graph.CudaRecorder`."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Runs `work` before anything like it is recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the work that `work` queues; nothing of it has run yet."""


class RecordedMicrosteps:
    """Repeats `loss_sum(inputs)` and the backward pass of `loss_sum(inputs) * scale`.

    Gradients are left in the parameters' `grad`, in memory that belongs to the graphs. The first
    micro-batch of a step finds none and sets them, the others add to them; nobody else may put
    other tensors there in between.
    """

    def __init__(
        self,
        loss_sum: Callable[[Mapping[str, Tensor]], Tensor],
        *,
        parameters: list[nn.Parameter],
        recorder: Recorder,
    ) -> None:
        self._loss_sum = loss_sum
        self._parameters = parameters
        self._recorder = recorder
        self._inputs: dict[str, Tensor] = {}
        self._scale: Tensor
        self._loss: Tensor
        self._gradients: list[Tensor | None] = []
        self._setting: Callable[[], None] | None = None
        self._adding: Callable[[], None] | None = None

    def __call__(self, inputs: Mapping[str, Tensor], *, scale: float) -> Tensor:
        """The loss sum of one micro-batch, () fp32, its gradients set or added.

        Raises:
            EngineError: the model cannot be recorded. The process cannot go on then.
            ValueError: the inputs have other shapes or dtypes than the first ones had, or the
                gradients are neither all gone nor those that were left.
        """
        self._take(inputs, scale)
        if all(parameter.grad is None for parameter in self._parameters):
            self._setting = self._setting or self._record_setting()
            self._setting()
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        elif self._gradients and self._hold_gradients():
            self._adding = self._adding or self._recorded()
            self._adding()
        else:
            raise ValueError("some gradients are not the tensors that the graphs write to")
        return self._loss.clone()

    def _take(self, inputs: Mapping[str, Tensor], scale: float) -> None:
        if not self._inputs:
            device = self._parameters[0].device
            self._inputs = {name: value.to(device).clone() for name, value in inputs.items()}
            self._scale = torch.zeros((), device=device)
            self._loss = torch.zeros((), device=device)
        found, expected = _kinds(inputs), _kinds(self._inputs)
        if found != expected:
            raise ValueError(f"recorded for inputs {expected}, found {found}")
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._scale.fill_(scale)

    def _hold_gradients(self) -> bool:
        held = zip(self._parameters, self._gradients, strict=True)
        return all(parameter.grad is gradient for parameter, gradient in held)

    def _run(self) -> None:
        loss = self._loss_sum(self._inputs)
        scaled_loss(loss, scale=self._scale).backward()  # type: ignore[no-untyped-call]
        self._loss.copy_(loss.detach())

    def _record_setting(self) -> Callable[[], None]:
        def run_and_forget() -> None:
            self._run()
            # Given back, or gradients would be held twice.
            self._forget_gradients()

        self._recorder.warm_up(run_and_forget)
        setting = self._recorded()
        self._gradients = [parameter.grad for parameter in self._parameters]
        return setting

    def _recorded(self) -> Callable[[], None]:
        try:
            return self._recorder.record(self._run)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"a CUDA graph of the training step does not fit beside what is in memory "
                f"({error}); take a smaller training.micro_batch_size, or {_WITHOUT}"
            ) from error
        # What CUDA refuses while it records arrives as RuntimeError.
        except RuntimeError as error:
            raise EngineError(
                f"the training step cannot be recorded as a CUDA graph ({error}); {_WITHOUT}"
            ) from error

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _kinds(inputs: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()}
