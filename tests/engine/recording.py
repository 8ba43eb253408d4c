"""A stand-in, on a CPU, for what records work as a CUDA graph: it holds addresses, not values.

What is recorded are the ATen calls with the tensors that they read and wrote; repeating writes into
the same tensors, whatever Python's names refer to by then. As on a GPU, recording runs nothing (its
effects are undone), and work that reads a value of the device is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
_WARM_UP_RUNS = 2


class TapeRecorder:
    """Records and repeats, as CudaRecorder does. `recorded` counts."""

    def __init__(self, *, may_wait: bool = False) -> None:
        self._may_wait = may_wait
        self.recorded = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        for _ in range(_WARM_UP_RUNS):
            work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        tape = _Tape(self._may_wait)
        with tape:
            work()
        tape.undo()
        return tape.repeat


class _Tape(TorchDispatchMode):
    def __init__(self, may_wait: bool) -> None:
        super().__init__()
        self._may_wait = may_wait
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WAITING and not self._may_wait:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                self._keep(tensor)
        out = func(*args, **kwargs)
        inputs = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_memory(tensor) for tensor in _tensors(out)} - inputs
        self._calls.append((func, args, kwargs, out))
        return out

    def _keep(self, tensor: Tensor) -> None:
        # Tensors of the tape itself hold nothing before it is repeated.
        if _memory(tensor) not in self._made:
            self._before.setdefault(id(tensor), (tensor, tensor.clone()))

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in self._before.values():
            tensor.copy_(value)
        for _, _, _, out in self._calls:
            for tensor in _tensors(out):
                if _memory(tensor) in self._made and tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, out in self._calls:
            found = _tensors(func(*args, **kwargs))
            for to, value in zip(_tensors(out), found, strict=True):
                if _memory(to) != _memory(value):
                    to.copy_(value)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
