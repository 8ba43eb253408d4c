"""A tiny Mamba and its batches, for workers that compare engines with one plain process."""

import torch
from recording import TapeRecorder
from torch import Tensor, nn

from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.schema import ActivationCheckpointing, MambaConfig
from mamba_dist.engine import fsdp2, zero
from mamba_dist.engine.base import Engine, OptimizerSettings, ParameterGroup
from mamba_dist.engine.world import World
from mamba_dist.engine.zero_settings import zero_settings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.param_groups import classify

MICRO_STEPS = 2
ROWS = 2
LENGTH = 12
WEIGHT_DECAY = 0.1
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 0.5
# DeepSpeed remembers parameters by id(); those of a collected engine could be given to the next
# one's.
_KEPT: list[zero.ZeroEngine] = []
OPTIMIZER = OptimizerSettings(beta1=0.9, beta2=0.95, eps=1e-8)


def tiny_config(layer: str) -> MambaConfig:
    # One head and an odd rank of dt: two ranks cannot share them evenly.
    return MambaConfig(
        layer=layer,
        d_model=32,
        n_layers=2,
        vocab_size=61,
        d_state=8,
        headdim=64,
        dt_rank=3,
        chunk_size=8,
    )


class Scaled(nn.Module):
    """The language model with a factor on its loss, through which tests inject NaN and spikes."""

    def __init__(self, lm: MambaLM) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, labels: Tensor, seq_idx: Tensor, scale: Tensor) -> Tensor:
        return self.lm(input_ids, labels=labels, seq_idx=seq_idx) * scale


def build(layer: str, *, checkpointing: ActivationCheckpointing = "none") -> MambaLM:
    backend = "gpu" if torch.cuda.is_available() else "torch"
    return MambaLM(tiny_config(layer), backend=backend, activation_checkpointing=checkpointing)


def parameter_groups(lm: MambaLM) -> list[ParameterGroup]:
    classes = classify(lm)
    return [
        ParameterGroup(tuple(f"lm.{c.name}" for c in classes if c.decay), WEIGHT_DECAY),
        ParameterGroup(tuple(f"lm.{c.name}" for c in classes if not c.decay), 0.0),
    ]


def batch(step: int, micro: int, rank: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random documents; the number of labels differs between ranks and micro-batches."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens = torch.randint(0, 61, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, : 1 + 2 * rank + micro] = -100
    seq_idx = (torch.arange(LENGTH) >= 5).int().expand(ROWS, LENGTH).contiguous()
    return {
        "input_ids": tokens[:, :-1],
        "labels": labels,
        "seq_idx": seq_idx,
        "scale": torch.tensor(scale),
    }


def step_tokens(step: int, world_size: int) -> int:
    parts = [batch(step, m, r) for m in range(MICRO_STEPS) for r in range(world_size)]
    return sum(int((p["labels"] != -100).sum()) for p in parts)


def build_fsdp2(
    *,
    layer: str,
    precision: str,
    world: World,
    checkpointing: ActivationCheckpointing = "none",
    gather_dtype: str = "fp32",
    reduce_dtype: str = "fp32",
    reshard_after_forward: bool = True,
) -> fsdp2.Fsdp2Engine:
    with fsdp2.construction():
        lm = build(layer, checkpointing=checkpointing)
        module = Scaled(lm)
    engine = fsdp2.Fsdp2Engine(
        module,
        groups=parameter_groups(lm),
        optimizer=OPTIMIZER,
        settings=fsdp2.Fsdp2Settings(precision, gather_dtype, reduce_dtype, reshard_after_forward),
        world=world,
        projections=lm.projections,
    )
    initialize(lm, tiny_config(layer), seed=3, gather=engine.gather)
    return engine


def build_zero(
    stage: int,
    *,
    layer: str,
    precision: str,
    world: World,
    checkpointing: ActivationCheckpointing = "none",
    recorded: bool = False,
    small_stay_whole: bool = False,
) -> zero.ZeroEngine:
    # Stage 3 then updates in several groups, and gives up parameters while it gathers others.
    config = EngineConfig(bucket_elements=2000) if stage == 3 else EngineConfig()
    settings = zero_settings(
        config, stage=stage, precision=precision, accumulation_steps=MICRO_STEPS
    )
    if not small_stay_whole:
        # By default parameters this small would stay whole on every rank, and stage 3 would test
        # nothing.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with zero.construction(settings):
        lm = build(layer, checkpointing=checkpointing)
    initialize(lm, tiny_config(layer), seed=3, gather=zero.gather)
    with zero.construction({"zero_optimization": {"stage": 0}}):
        module = Scaled(lm)
    engine = zero.ZeroEngine(
        module.to(world.device),
        groups=parameter_groups(lm),
        optimizer=OPTIMIZER,
        settings=settings,
        world=world,
        # The batches of these tests all have their documents in the same places.
        recorder=TapeRecorder(may_wait=True) if recorded else None,
    )
    _KEPT.append(engine)
    return engine


def build_engine(kind: int | str, **choices) -> Engine:
    """The engine of a ZeRO stage, or of FSDP2 where `kind` is "fsdp2"."""
    return build_fsdp2(**choices) if kind == "fsdp2" else build_zero(kind, **choices)


def engine_step(
    engine: Engine,
    step: int,
    *,
    world: World,
    scales: dict[tuple[int, int], float] | None = None,
    skip_above: float | None = None,
):
    """One optimizer step; `scales` maps (micro step, rank) to the factor on that loss."""
    total = 0.0
    for micro in range(MICRO_STEPS):
        scale = (scales or {}).get((micro, world.rank), 1.0)
        loss = engine.forward_backward(
            batch(step, micro, world.rank, scale),
            step_tokens=step_tokens(step, world.size),
            last=micro == MICRO_STEPS - 1,
        )
        total += float(loss)
    stats = engine.step(LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, skip_above=skip_above)
    return world.sum_over_ranks([total])[0], stats


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with engine.gather([parameter]):
            weights[name] = engine.module.get_parameter(name).detach().clone()
    return weights
