"""Bytes of training state and buffers on each rank, by engine and stage; needs no torch.

All is fp32: 4 bytes a parameter each for the parameter, its gradient and AdamW's two moments.
Measured, not read off the names of the stages: tests/train/test_memory_model.py compares it with
what is allocated. With one rank that makes 16 bytes a parameter at stage 0, which is what one rank
runs, and would make 20 at stages 1 and 2 (which gather the gradients of their part in tensors of
their own) and at stage 3 (where AdamW updates a copy of the parameters).
"""

from dataclasses import dataclass
from typing import Final

from mamba_dist.config.engine import EngineConfig

_FP32: Final = 4
# DeepSpeed's stage 0 flattens so many elements of the gradients to reduce them.
_REDUCED_AT_ONCE: Final = 500_000_000
# Layers whose gradients are whole while stage 2 reduces them; that FSDP2 gathers, differentiates
# and reduces at once; and those that it does if the backward pass finds them whole.
_LAYERS_IN_STAGE_2: Final = 3
_LAYERS_IN_FSDP2: Final = 5
_LAYERS_IN_FSDP2_IF_WHOLE: Final = 2


@dataclass(frozen=True)
class ModelSize:
    """Elements of a model's parameters: all of them, of one layer, and those outside of layers."""

    parameters: int
    layer: int
    rest: int


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank, at their most; activations come on top."""

    parameters: int
    gradients: int
    """At the end of a step's last backward pass."""
    carried_gradients: int
    """While a forward pass runs: those of the micro-batches before."""
    optimizer: int
    buffers: int
    """What is gathered or reduced at once, all through forward and backward pass."""
    reduction: int
    """What the reduction of gradients takes at the end of the backward pass only."""
    flattened: int = 0
    """What the update adds to `gradients`, at most: it copies one group of parameters at a time."""
    whole_layers: int = 0
    """Parameters that are whole from their layer's forward pass to its backward pass."""

    @property
    def before_backward(self) -> int:
        """When all activations of a step's last micro-batch are there."""
        held = self.parameters + self.optimizer + self.carried_gradients
        return held + self.buffers + self.whole_layers

    @property
    def after_backward(self) -> int:
        """When all gradients are there, or are given to AdamW."""
        return self.certain + max(self.flattened, self.buffers + self.reduction)

    @property
    def certain(self) -> int:
        """What any run of any model has after its backward pass: no buffers."""
        return self.parameters + self.optimizer + self.gradients


def stage_for(config: EngineConfig, *, ranks: int) -> int:
    """The ZeRO stage that runs: on one rank, which has nobody to share with, always 0.

    The others would only cost it copies.
    """
    assert config.zero_stage is not None, f"{config.kind} has no stages"
    return config.zero_stage if ranks > 1 else 0


def engine_name(config: EngineConfig, *, ranks: int) -> str:
    """zero-0 to zero-3, or fsdp2: what runs, and what a checkpoint says of its writer."""
    return "fsdp2" if config.kind == "fsdp2" else f"zero-{stage_for(config, ranks=ranks)}"


def state_bytes(
    size: ModelSize, config: EngineConfig, *, ranks: int, accumulation_steps: int, on_gpu: bool
) -> StateBytes:
    """What the engine that `config` chooses holds on each of the ranks, about."""
    if config.kind == "fsdp2":
        return _fsdp2(size, config, ranks=ranks, accumulates=accumulation_steps > 1)
    stage = stage_for(config, ranks=ranks)
    # Communication beside the backward pass fills one bucket while another is reduced.
    buckets = _FP32 * config.bucket_elements * (2 if on_gpu else 1)
    whole = _FP32 * size.parameters
    part = -(-whole // ranks)
    accumulates = accumulation_steps > 1
    if stage == 0:
        flattened = _FP32 * min(size.parameters, _REDUCED_AT_ONCE) if ranks > 1 else 0
        return StateBytes(whole, whole, whole * accumulates, 2 * whole, 0, flattened)
    if stage == 1:
        return StateBytes(whole, whole + part, whole * accumulates, 2 * part, buckets, 0)
    if stage == 2:
        in_flight = _FP32 * _LAYERS_IN_STAGE_2 * size.layer
        # The part is summed up anew in each micro-batch, beside the sums before.
        return StateBytes(
            parameters=whole,
            gradients=2 * part if accumulates else part,
            carried_gradients=part * accumulates,
            optimizer=2 * part,
            buffers=buckets,
            reduction=in_flight,
            flattened=0 if accumulates else part,
        )
    live = min(size.parameters, 2 * config.bucket_elements + size.layer)
    # The gradients' part is one tensor for the whole run; AdamW has a copy of the parameters.
    gathered = _FP32 * (config.bucket_elements + live)
    return StateBytes(2 * part, part, part, 2 * part, gathered, 0)


def _fsdp2(size: ModelSize, config: EngineConfig, *, ranks: int, accumulates: bool) -> StateBytes:
    whole = _FP32 * size.parameters
    part = -(-whole // ranks)
    # The rest of the module is gathered before the first layer, and given up after the last.
    layers = 0 if config.reshard_after_forward else _FP32 * (size.parameters - size.rest)
    in_flight = _LAYERS_IN_FSDP2_IF_WHOLE if layers else _LAYERS_IN_FSDP2
    units = _FP32 * (size.rest + min(size.parameters, in_flight * size.layer))
    shared = ranks > 1
    return StateBytes(
        parameters=part,
        gradients=part,
        # Whole until the last backward pass reduces them, layer by layer.
        carried_gradients=whole if accumulates else 0,
        optimizer=2 * part,
        buffers=units if shared else 0,
        reduction=0,
        whole_layers=layers if shared else 0,
    )
