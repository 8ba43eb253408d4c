"""Gradients of the parts of one tensor, written side by side by the kernels that compute them.

The backward of a plain split copies them together, each already written once. Here all parts share
a buffer in the shape of the whole; a kernel that can leave gaps between its rows asks for the place
of its part and writes there, and the split's backward finds nothing left to do.

Nothing depends on anybody's having written there: what lies elsewhere is copied, as by a plain
split, whichever way it got there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Whose kernels write gradients in place.
_WRITING_BACKENDS: Final = ("gpu",)
_NO_PASS: Final = -1


@dataclass(frozen=True)
class GradientPart:
    """The place of one part's gradient; shared by whoever computes a gradient of that part."""

    joint: "JointGradient"
    index: int


class JointGradient:
    """Room for the gradient of a tensor (..., sum of widths), in parts along its last dimension.

    One for each call of a forward: the buffer belongs to one backward pass at a time. It is made
    when the first part is asked for, and let go of when the parts are gathered, so that none is
    ever written twice. It holds no tensor of the forward.
    """

    def __init__(self, whole: Tensor, widths: Sequence[int]) -> None:
        self._shape, self._dtype, self._device = whole.shape, whole.dtype, whole.device
        self.widths: Final = tuple(widths)
        self._starts = (0, *accumulate(self.widths))
        self._pass = _NO_PASS
        self._buffer: Tensor | None = None
        self._claimed: set[int] = set()

    def claim(
        self, index: int, shape: torch.Size, dtype: torch.dtype, *, aligned_to: int = 1
    ) -> Tensor | None:
        """The place of part `index` as an uninitialised view of `shape`, for the caller to fill.

        `shape` is the part's, or that with its last dimension split. None if the gradient cannot
        lie there: outside of a backward pass, in another dtype or shape, where offset and row
        stride are no multiples of `aligned_to` elements, or if somebody else has the place.
        """
        leading, width = self._shape[:-1], self.widths[index]
        fits = shape[: len(leading)] == leading and prod(shape[len(leading) :]) == width
        numbers = self._starts[index], self._shape[-1], width
        if dtype != self._dtype or not fits or any(number % aligned_to for number in numbers):
            return None
        # What an interrupted or partial pass left behind may be held by whoever asked for it.
        current = torch._C._current_graph_task_id()
        if current == _NO_PASS:
            return None
        if current != self._pass:
            self._pass, self._buffer, self._claimed = current, None, set()
        if index in self._claimed:
            return None
        self._claimed.add(index)
        buffer = self._buffer
        if buffer is None:
            buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._buffer = buffer
        return self._place(buffer, index).view(shape)

    def gathered(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of the whole; None for a part is zeros, and for all of them None."""
        buffer = self._buffer if self._pass == torch._C._current_graph_task_id() else None
        claimed, self._buffer, self._claimed = self._claimed, None, set()
        if all(gradient is None for gradient in gradients):
            return None
        # A second derivative needs a graph, which writing into the buffer would not leave.
        if buffer is None or torch.is_grad_enabled():
            return self._joined(gradients)
        away = [
            index
            for index, gradient in enumerate(gradients)
            if gradient is None or not _is_same(gradient, self._place(buffer, index))
        ]
        # Somebody may still hold what was written to a place that the gradient does not lie in.
        if any(index in claimed for index in away):
            return self._joined(gradients)
        for index in away:
            gradient, place = gradients[index], self._place(buffer, index)
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient)
        return buffer

    def _place(self, buffer: Tensor, index: int) -> Tensor:
        return buffer.narrow(-1, self._starts[index], self.widths[index])

    def _joined(self, gradients: Sequence[Tensor | None]) -> Tensor:
        some = next(gradient for gradient in gradients if gradient is not None)
        return torch.cat(
            [
                some.new_zeros(*self._shape[:-1], width) if gradient is None else gradient
                for gradient, width in zip(gradients, self.widths, strict=True)
            ],
            dim=-1,
        )


def _is_same(tensor: Tensor, place: Tensor) -> bool:
    """Whether both are the same elements of one memory, in the same order."""
    if type(tensor) is not Tensor or (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
        return False
    # The stride of an axis of one entry may be anything, and is never used.
    strides = zip(tensor.shape, tensor.stride(), place.stride(), strict=True)
    return tensor.data_ptr() == place.data_ptr() and all(
        size == 1 or own == other for size, own, other in strides
    )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: JointGradient, whole: Tensor) -> tuple[Tensor, ...]:
        ctx.joint = joint
        ctx.set_materialize_grads(False)
        return whole.split(joint.widths, dim=-1)  # type: ignore[no-untyped-call, no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None]:
        return None, ctx.joint.gathered(gradients)


def split(
    whole: Tensor, widths: Sequence[int], *, backend: str
) -> tuple[tuple[Tensor, ...], tuple[GradientPart | None, ...]]:
    """Views of the parts (..., width), and the places for their gradients.

    A place is None where nobody could use it: for backends whose kernels cannot write there, and
    without a gradient. Then this is torch's own split. Otherwise the gradients that one backward
    gives of `whole` and of the parts may lie in one memory.

    Args:
        whole: (..., sum of widths).
        widths: of the parts along the last dimension.
        backend: a name from `resolve_backend`.
    """
    wanted = torch.is_grad_enabled() and whole.requires_grad and not torch.compiler.is_compiling()
    # The ops say themselves that they have no forward-mode derivative.
    wanted = wanted and forward_ad._current_level < 0
    if backend not in _WRITING_BACKENDS or not wanted:
        plain: tuple[Tensor, ...] = whole.split(tuple(widths), dim=-1)  # type: ignore[no-untyped-call]
        return plain, (None,) * len(plain)
    joint = JointGradient(whole, widths)
    parts: tuple[Tensor, ...] = _Split.apply(joint, whole)  # type: ignore[no-untyped-call]
    return parts, tuple(GradientPart(joint, index) for index in range(len(parts)))


def empty_gradient(like: Tensor, part: GradientPart | None, *, aligned_to: int = 1) -> Tensor:
    """Room for the gradient of `like`: in the place of `part` if it can lie there, else contiguous.

    All its rows, the leading dimensions taken as one, are evenly spaced. `aligned_to` elements are
    what the caller writes at once.
    """
    place = None
    if part is not None:
        place = part.joint.claim(part.index, like.shape, like.dtype, aligned_to=aligned_to)
    return like.new_empty(like.shape) if place is None else place
