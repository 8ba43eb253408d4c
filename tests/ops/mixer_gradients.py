"""Gradients of a whole mixer by the GPU's kernels on the CPU, with and without shared buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from emulated_kernels import launch_emulated
from op_comparison import packed, random_tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_dist.config.schema import MambaConfig
from mamba_dist.model.mamba1 import Mamba1Mixer
from mamba_dist.model.mamba2 import Mamba2Mixer
from mamba_dist.ops import joint_gradient
from mamba_dist.ops.causal_conv1d import gpu as conv_gpu
from mamba_dist.ops.gated_rms_norm import gpu as norm_gpu
from mamba_dist.ops.selective_scan import gpu_launch

LENGTH = 41
MIXERS = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}
CHECKPOINTING = ("none", "selective", "full")
MOVES = {"cat", "copy_", "clone", "_to_copy", "fill_", "zero_"}
"""Operators that only move gradients."""


class Operators(TorchDispatchMode):
    """How often each of torch's operators ran, by name, and on tensors as large as the rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.large: dict[str, int] = {}
        self._rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self._rows:
            name = func.overloadpacket.__name__
            self.large[name] = self.large.get(name, 0) + 1
        return result


@contextmanager
def emulated() -> Iterator[None]:
    """Launches all CUDA kernels of the mixers on the CPU; not Triton's."""
    modules = (conv_gpu, norm_gpu, gpu_launch)
    patches = [mock.patch.object(module, "launch", launch_emulated) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def plain() -> Iterator[None]:
    """Splits as torch does."""
    with mock.patch.object(joint_gradient, "_WRITING_BACKENDS", ()):
        yield


@contextmanager
def placements() -> Iterator[list[bool]]:
    """Of each part's gradient that is gathered, whether it lies in its place already."""
    found: list[bool] = []
    is_same = joint_gradient._is_same

    def remember(*tensors: Tensor) -> bool:
        found.append(is_same(*tensors))
        return found[-1]

    with mock.patch.object(joint_gradient, "_is_same", remember):
        yield found


def gradients(
    layer: str, *, checkpointing: str = "none", autocast: bool = False, backwards: int = 1
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """By name those of input and parameters, and operators of the last backward on large tensors.

    Large is from the least width of in_proj's parts on, at all positions.
    """
    fields = {"d_model": 32, "n_layers": 1, "vocab_size": 8, "d_state": 16, "layer": layer}
    if layer == "mamba2":
        fields |= {"headdim": 16, "ngroups": 1, "chunk_size": 16}
    config = MambaConfig.model_validate(fields)
    mixer: nn.Module = MIXERS[layer](
        config, backend="gpu", selective_recomputation=checkpointing == "selective"
    )
    with torch.no_grad():
        for number, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.3 * random_tensor(*parameter.shape, seed=30 + number))
    hidden = random_tensor(2, LENGTH, config.d_model, seed=1).float().requires_grad_()
    seq_idx = packed(LENGTH)

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output: Tensor = mixer(hidden, seq_idx)[0]
        return output

    y = checkpoint(forward, hidden, use_reentrant=False) if checkpointing == "full" else None
    y = forward(hidden) if y is None else y
    operators = Operators(2 * LENGTH * config.d_inner)
    for left in reversed(range(backwards)):
        mixer.zero_grad()
        hidden.grad = None
        weights = random_tensor(*y.shape, seed=2).to(y.dtype)
        operators.large.clear()
        with operators:
            y.backward(weights, retain_graph=left > 0)
    named = {"hidden": hidden, **dict(mixer.named_parameters())}
    return {name: tensor.grad for name, tensor in named.items()}, operators.large
