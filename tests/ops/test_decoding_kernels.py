"""Whole models that decode on the GPU's kernels, whose sources run on the CPU."""

import ctypes
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulated_kernels import launch_emulated
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_dist.config.schema import MambaConfig
from mamba_dist.inference.graph import DecodingStep
from mamba_dist.inference.precision import round_matrices
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.causal_conv1d import gpu_step
from mamba_dist.ops.gated_rms_norm import gpu as gated_norm
from mamba_dist.ops.native import call
from mamba_dist.ops.nvrtc import state_step
from mamba_dist.ops.nvrtc.kernel import Kernel
from mamba_dist.ops.rms_norm import gpu as norm

TOKENS = [[3, 5], [40, 5], [7, 60], [1, 2]]
# Operators that launch nothing: they look at memory in another way, or ask for some.
FREE = (
    *(
        "view",
        "_unsafe_view",
        "split",
        "split_with_sizes",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
    ),
    *("t", "transpose", "expand", "detach", "alias", "empty", "new_empty", "lift_fresh"),
)
BEFORE = ["copy_", "embedding"]
LAYERS = {
    "mamba1": [
        *("add_rms_norm_forward", "mm", "causal_conv1d_step", "mm", "mm", "state_step", "mm"),
    ],
    "mamba2": [
        *("add_rms_norm_forward", "mm", "causal_conv1d_step", "state_step"),
        *("gated_rms_norm_forward", "mm"),
    ],
}
AFTER = ["add_rms_norm_forward", "mm", "fill_"]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was launched, in order: our kernels, and torch's operators under `Operators`."""
    names: list[str] = []

    def launch(kernel: Kernel, fields: ctypes.Structure, **options: Any) -> None:
        names.append(kernel.name)
        launch_emulated(kernel, fields, **options)

    for module in (state_step, gpu_step, norm, gated_norm):
        monkeypatch.setattr(module, "launch", launch)
    return names


class Operators(TorchDispatchMode):
    """Notes the operators of torch that a GPU would launch something for."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self._names.append(name)
        return function(*args, **(kwargs or {}))


def model(layer: str, backend: str) -> MambaLM:
    # A dt_rank of 4, so that B and C of Mamba-1 lie where they can be read four at a time.
    config = MambaConfig(
        layer=layer, d_model=64, n_layers=2, vocab_size=61, d_state=16, headdim=16,
        pad_vocab_size_multiple=64, initializer_range=1.0,
    )  # fmt: skip
    made = MambaLM(config, backend=backend)
    initialize(made, config, seed=0, gather=lambda _: nullcontext())
    return made


def begun(made: MambaLM) -> DecodingStep:
    """A step after the first tokens, uncaptured."""
    with torch.no_grad():
        _, states = made.forward_with_state(torch.tensor(TOKENS[0])[:, None])

    def capture(compute: Any, _: torch.device) -> Any:
        compute()
        return compute

    return DecodingStep(made, states, capture=capture)


@pytest.mark.parametrize("layer", LAYERS)
def test_texts_have_the_logits_of_the_torch_backend(layer: str) -> None:
    ours, theirs = begun(model(layer, "gpu")), begun(model(layer, "torch"))
    for tokens in TOKENS[1:]:
        found, expected = (step(torch.tensor(tokens)) for step in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours._states, theirs._states, strict=True):
        torch.testing.assert_close(one.ssm, other.ssm, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.conv, other.conv, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_its_products_and_one_kernel_for_each_other_op(
    layer: str, rounded: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(layer, "gpu")
    step = begun(round_matrices(made) if rounded else made)
    places = [part.data_ptr() for s in step._states for part in (s.conv, s.ssm)]
    launched.clear()
    # It would be seen to look, and what it looks for would go another way.
    monkeypatch.setattr(call, "is_in_torch_dispatch_mode", lambda: False)
    with Operators(launched):
        step(torch.tensor(TOKENS[1]))
    # No cast, no copy of a state, no A: each would be a launch a layer.
    assert launched == [*BEFORE, *LAYERS[layer], *LAYERS[layer], *AFTER]
    assert places == [part.data_ptr() for s in step._states for part in (s.conv, s.ssm)]
