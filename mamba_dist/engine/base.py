"""The seam between the training loop and a way of distributing it (DESIGN: Engine protocol).

The loop, the checkpoint and the tools see only what stands here. An engine's share of the state is
a set of fragments: for each parameter one contiguous range of its flattened fp32 master copy with
the same range of AdamW's moments. Every ZeRO stage and FSDP2 own their state in that form, so a
checkpoint written by one engine can be read by another.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

StateKind = Literal["master", "exp_avg", "exp_avg_sq"]
DROP = -1.0
"""As `skip_above`: every step is dropped, whatever its gradient norm."""
STATE_KINDS: tuple[StateKind, ...] = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """One rank's contiguous range of one parameter: fp32 master and AdamW moments, each (numel,).

    `start` counts elements in the flattened, unpadded parameter. The tensors are views of live
    training state: read them before the next `step` changes it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensor(self, kind: StateKind) -> Tensor:
        """The range of one kind of state, (numel,) fp32."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind]


class FragmentReader(Protocol):
    """Whatever can give back ranges of parameters and moments, for example an open checkpoint."""

    def read(self, name: str, kind: StateKind, *, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a parameter's flattened state `kind`, (numel,) fp32."""


@dataclass(frozen=True)
class StepStats:
    """An optimizer step's global gradient norm before clipping, and whether it was dropped."""

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a weight decay."""

    names: tuple[str, ...]
    weight_decay: float


@dataclass(frozen=True)
class OptimizerSettings:
    """Hyperparameters of AdamW (arXiv 1711.05101) that do not change during a run."""

    beta1: float
    beta2: float
    eps: float


class Engine(Protocol):
    """Forward, backward, update and state of a module over all ranks."""

    @property
    def module(self) -> nn.Module:
        """The wrapped module; its parameters may be partitioned, see `gather`."""

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has applied."""

    def forward_backward(
        self, inputs: Mapping[str, Tensor], *, step_tokens: int, last: bool
    ) -> Tensor:
        """Loss sum of one micro-batch, () fp32, detached; gradients are accumulated.

        A loss that is not finite makes all gradients NaN, so that `step` drops them on all ranks.

        The module returns the loss summed over its valid labels; the gradient is that of the sum
        over all ranks and micro-batches divided by `step_tokens`, the valid labels of the whole
        optimizer step. `last` marks the micro-batch after which gradients are reduced.
        """

    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the module returns for `inputs`, without gradients."""

    def step(
        self, lr: float, *, max_grad_norm: float | None, skip_above: float | None
    ) -> StepStats:
        """Clips and applies the accumulated gradients, or drops them on all ranks.

        They are dropped when their global norm is not finite or exceeds `skip_above`; weights,
        moments and AdamW's step are then bit-equal to before.
        """

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the training state; over all ranks every element occurs once."""

    def load_fragments(self, reader: FragmentReader, *, adam_steps: int) -> None:
        """Overwrites parameters, moments and AdamW's step from `reader`."""

    def gather(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        """Context in which `parameters` are whole; what rank 0 writes there becomes their value.

        The module may hold other tensors in their place meanwhile: look them up by their names.
        """


def scaled_loss(loss_sum: Tensor, *, scale: float | Tensor) -> Tensor:
    """`loss_sum * scale`, () fp32; its gradient is NaN if the loss is not finite.

    An infinite loss may have finite gradients (a label of probability 0). No value is read: the
    device works on.
    """
    # 0 for what is finite, NaN otherwise.
    return loss_sum * (loss_sum.detach() * 0 + scale)


def flat_share(numel: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of the range that `rank` owns when `numel` is cut in equal parts."""
    size = -(-numel // world_size)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def require_fp32(module: nn.Module) -> None:
    """Raises TypeError unless every parameter is stored in float32."""
    wrong = [n for n, p in module.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise TypeError(f"parameters must be stored in float32, these are not: {', '.join(wrong)}")
