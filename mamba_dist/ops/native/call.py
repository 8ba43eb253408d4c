"""What every call of a kernel needs on the Python side, and when it may go past torch's dispatcher.

The dispatcher takes 13 us a call, 130 us with autograd: more than a small kernel.
"""

from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

STORAGE: Final = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float64: 2})
"""The numbers by which the kernels know these dtypes; others go through fp32."""


def may_skip_dispatch(tensor: Tensor) -> bool:
    """Whether nobody has to see the operator, and `tensor` has memory of its own on the CPU."""
    return tensor.device.type == "cpu" and is_unobserved(tensor)


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether all have memory of their own, and no compiler, mode or transform looks at operators.

    Gradients are not asked for, forward-mode ones are.
    """
    # First, since under a compiler the other questions have no answer.
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not is_in_torch_dispatch_mode()
        and all(tensor is None or _is_plain(tensor) for tensor in tensors)
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and (forward_ad._current_level < 0 or _tangent(tensor) is None)
    )


def taken_over(state: Tensor | None, *, donated: bool) -> bool:
    """Whether a kernel may write over `state`, of which autograd then hears.

    Inference tensors may be written to in their own mode only.
    """
    if state is None or not donated:
        return False
    if state.is_inference():
        return torch.is_inference_mode_enabled()
    torch.autograd.graph.increment_version(state)
    return True


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError for forward-mode differentiation, whose tangents would be lost."""
    # The level is read first: unpacking takes a microsecond a tensor.
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and _tangent(tensor) is not None:
            raise NotImplementedError(
                f"{operation} has no forward-mode derivative; use backend='reference' for one"
            )


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call, no-any-return]


def pointer(tensor: Tensor | None) -> int | None:
    """Where the tensor's first element lies; the caller keeps the tensor alive."""
    return None if tensor is None else tensor.data_ptr()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last dimension lies side by side; rows may have any stride."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
