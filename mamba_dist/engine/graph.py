"""Forward and backward of a micro-batch as CUDA graphs: recorded once, launched as a whole.

A layer is some sixty kernels of a few microseconds each, and with activation checkpointing a third
more; unless the model or the micro-batch is large, a GPU finishes them sooner than Python can ask
for them. Parameters are updated in place and keep their addresses, so a graph sees each update.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from mamba_dist.errors import EngineError
from mamba_dist.ops.cuda_graph import Recording, record

_WITHOUT = "set engine.cuda_graphs: false"


class Recorder(Protocol):
    """How a computation is recorded, see `mamba_dist.ops.cuda_graph.record`."""

    def __call__(
        self,
        compute: Callable[[], None],
        device: torch.device,
        *,
        warm_up: Callable[[], None] | None = None,
        pool: object = None,
    ) -> Recording:
        """What `compute` launches, to be repeated."""


class RecordedMicrosteps:
    """Repeats `loss_sum(inputs)` and the backward pass of `loss_sum(inputs) * scale`.

    Gradients are left in the parameters' `grad`, in memory that belongs to the graphs: set where a
    parameter has none, added to where it has.
    """

    def __init__(
        self,
        loss_sum: Callable[[Mapping[str, Tensor]], Tensor],
        *,
        parameters: list[nn.Parameter],
        recorder: Recorder = record,
    ) -> None:
        self._loss_sum = loss_sum
        self._parameters = parameters
        self._recorder = recorder
        self._inputs: dict[str, Tensor] = {}
        self._scale: Tensor
        self._loss: Tensor
        self._gradients: list[Tensor | None] = []
        # The first micro-batch of a step writes gradients, the others add to them.
        self._setting: Recording | None = None
        self._adding: Recording | None = None

    def __call__(self, inputs: Mapping[str, Tensor], *, scale: float) -> Tensor:
        """The loss sum of one micro-batch, () fp32, its gradients set or added.

        Raises:
            EngineError: the model cannot be recorded.
            ValueError: the inputs have other shapes than the first ones had.
        """
        self._take(inputs, scale)
        if all(parameter.grad is None for parameter in self._parameters):
            self._setting = self._setting or self._record_setting()
            self._setting.replay()
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        else:
            self._adding = self._adding or self._record_adding()
            self._adding.replay()
        return self._loss.clone()

    def _take(self, inputs: Mapping[str, Tensor], scale: float) -> None:
        if not self._inputs:
            device = self._parameters[0].device
            self._inputs = {name: value.to(device).clone() for name, value in inputs.items()}
            self._scale = torch.zeros((), device=device)
            self._loss = torch.zeros((), device=device)
        found = {name: value.shape for name, value in inputs.items()}
        expected = {name: value.shape for name, value in self._inputs.items()}
        if found != expected:
            raise ValueError(f"recorded for inputs of {expected}, found {found}")
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._scale.fill_(scale)

    def _run(self) -> None:
        loss = self._loss_sum(self._inputs)
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        self._loss.copy_(loss.detach())

    def _record_setting(self) -> Recording:
        def warm_up() -> None:
            self._run()
            # Given back, or gradients would be held twice.
            self._forget_gradients()

        recording = self._recorded(self._run, warm_up=warm_up, pool=None)
        self._gradients = [parameter.grad for parameter in self._parameters]
        return recording

    def _record_adding(self) -> Recording:
        assert self._setting is not None
        # All kernels have run, and running would add.
        return self._recorded(self._run, warm_up=lambda: None, pool=self._setting.pool())

    def _recorded(
        self, compute: Callable[[], None], *, warm_up: Callable[[], None], pool: object
    ) -> Recording:
        try:
            return self._recorder(compute, self._parameters[0].device, warm_up=warm_up, pool=pool)
        except torch.OutOfMemoryError:
            raise
        # What CUDA refuses while it records arrives as RuntimeError.
        except RuntimeError as error:
            raise EngineError(
                f"the training step cannot be recorded as a CUDA graph ({error}); {_WITHOUT}"
            ) from error

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
