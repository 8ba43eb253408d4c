"""A stand-in, on a CPU, for what records a computation as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stand:
    """Repeats a computation on a CPU as a graph would: into the tensors that it made when recorded.

    Recording runs nothing, so gradients that were there before are as they were.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.recorded = 0

    def __call__(
        self,
        compute: Callable[[], None],
        device: torch.device,
        *,
        warm_up: Callable[[], None] | None = None,
        pool: object = None,
    ) -> "Replay":
        assert device.type == "cpu"
        self.recorded += 1
        (warm_up or compute)()
        before = [p.grad for p in self._parameters]
        values = [None if g is None else g.clone() for g in before]
        compute()
        outputs = [p.grad for p in self._parameters]
        for gradient, value in zip(before, values, strict=True):
            if gradient is not None and value is not None:
                gradient.copy_(value)
            else:
                # What a graph's memory holds before its first launch is anything.
                for output in outputs:
                    assert output is not None
                    output.fill_(float("nan"))
        return Replay(compute, self._parameters, before, outputs)


class Replay:
    def __init__(
        self,
        compute: Callable[[], None],
        parameters: list[nn.Parameter],
        before: list[Tensor | None],
        outputs: list[Tensor | None],
    ) -> None:
        self._compute = compute
        self._parameters = parameters
        self._before = before
        self._outputs = outputs

    def replay(self) -> None:
        kept = [p.grad for p in self._parameters]
        for parameter, gradient in zip(self._parameters, self._before, strict=True):
            parameter.grad = gradient
        self._compute()
        for parameter, output in zip(self._parameters, self._outputs, strict=True):
            if output is not parameter.grad:
                assert output is not None
                assert parameter.grad is not None
                output.copy_(parameter.grad)
        for parameter, gradient in zip(self._parameters, kept, strict=True):
            parameter.grad = gradient

    def pool(self) -> Any:
        return self
