"""What a run takes of each rank's memory, from its config alone, and whether that is there.

Two numbers: the estimate of the peak, and what is certain, a lower bound of it that no run goes
below. A plan goes by the first; a start is refused by the second only, since a run that would have
fitted must never be. Needs no torch.
"""

from dataclasses import dataclass
from typing import Final

from mamba_dist.config.batch import batch_plan
from mamba_dist.config.schema import ActivationCheckpointing, RunConfig
from mamba_dist.engine.memory import ModelSize, StateBytes, engine_name, state_bytes
from mamba_dist.model.flops import layer_parameters, parameter_count
from mamba_dist.model.memory import ActivationBytes, MicroBatch, activation_bytes

GIB: Final = 1 << 30
SAVED_BYTES: Final = 12
"""Of a parameter in a checkpoint: itself and AdamW's two moments, in fp32."""
# Resident after the imports of torch and DeepSpeed and the start of gloo; a CUDA context.
_CPU_PROCESS: Final = 600 << 20
_GPU_PROCESS: Final = 512 << 20
# What a CPU rank was seen to hold that keeps what it frees, over what it had allocated at most.
KEPT_OVER_ALLOCATED: Final = 2
# Other backends of the ops keep fewer of the scan's states than those that `auto` takes.
_SURE_PERCENT: Final = 90


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank."""

    engine: str
    """zero-0 to zero-3, or fsdp2: what runs, which on one rank may not be what is asked for."""
    checkpointing: ActivationCheckpointing
    state: StateBytes
    activations: ActivationBytes
    process: int
    """What the process holds before it has built anything."""

    @property
    def peak(self) -> int:
        """The most there is at once, about: all activations, or all gradients."""
        state, activations = self.state, self.activations
        return self.process + max(
            state.before_backward + activations.total,
            state.after_backward + activations.working,
        )

    @property
    def certain(self) -> int:
        """What the run needs at least, the process itself and all that is for a while left out."""
        state = self.state
        before = state.parameters + state.optimizer + state.carried_gradients
        return max(state.certain, before + self.sure_activations)

    @property
    def sure_activations(self) -> int:
        """What all layers keep, with any backend of the ops."""
        layers = self.activations.layers
        return layers if self.checkpointing == "full" else layers * _SURE_PERCENT // 100


def memory_plan(config: RunConfig, *, ranks: int, on_gpu: bool) -> MemoryPlan:
    """What each of `ranks` ranks holds.

    Raises:
        ConfigError: the global batch cannot be cut evenly.
    """
    batch = batch_plan(config, ranks)
    model, training = config.model, config.training
    layer = layer_parameters(model)
    parameters = parameter_count(model)
    return MemoryPlan(
        engine=engine_name(config.engine, ranks=ranks),
        checkpointing=training.activation_checkpointing,
        state=state_bytes(
            ModelSize(parameters, layer, parameters - layer * model.n_layers),
            config.engine,
            ranks=ranks,
            accumulation_steps=batch.accumulation_steps,
            on_gpu=on_gpu,
        ),
        activations=activation_bytes(
            model,
            MicroBatch(
                batch.micro_batch_size, config.data.sequence_length, training.precision, on_gpu
            ),
            training.activation_checkpointing,
        ),
        process=_GPU_PROCESS if on_gpu else _CPU_PROCESS,
    )


def memory_problem(
    config: RunConfig, *, ranks: int, ranks_on_host: int, on_gpu: bool, available: int
) -> str | None:
    """Why the run cannot fit, with its numbers, or None if it may.

    Args:
        ranks_on_host: those that share `available` on a CPU; a GPU is one rank's.
        available: bytes that nobody holds yet, of the host or of this rank's GPU.

    Raises:
        ConfigError: the global batch cannot be cut evenly.
    """
    plan = memory_plan(config, ranks=ranks, on_gpu=on_gpu)
    sharing = 1 if on_gpu else ranks_on_host
    if plan.certain * sharing <= available:
        return None
    where = "this GPU has" if on_gpu else "this host has"
    if sharing > 1:
        where = f"{sharing} ranks take {sharing * plan.certain / GIB:.1f} GiB at least, and {where}"
    alone = plan.state.certain * sharing <= available
    return (
        f"the run does not fit: {describe_need(config, plan, ranks=ranks)}; {where} "
        f"{available / GIB:.1f} GiB free. {_advice(config, plan, ranks=ranks, state_fits=alone)}; "
        "tools/plan.py --config … prints what each takes"
    )


def describe_need(config: RunConfig, plan: MemoryPlan, *, ranks: int) -> str:
    """The certain part of a plan in words and numbers."""
    parameters = parameter_count(config.model)
    held = plan.state.certain
    text = (
        f"{parameters:,} parameters x {held / parameters:.3g} bytes (fp32 parameters, gradients "
        f"and AdamW's moments, {engine_title(plan.engine)} on {ranks} rank{'s' * (ranks > 1)}) = "
        f"{held / GIB:.1f} GiB a rank"
    )
    if plan.certain > held:
        training = config.training
        text += (
            f"; the activations of {training.micro_batch_size} x "
            f"{config.data.sequence_length:,} positions (training.activation_checkpointing "
            f"{plan.checkpointing}) take {plan.sure_activations / GIB:.1f} GiB, which makes "
            f"{plan.certain / GIB:.1f} GiB at once"
        )
    return text + f" at least, some {plan.peak / GIB:.1f} GiB at the peak"


def engine_title(engine: str) -> str:
    """An engine's name as people write it."""
    return "FSDP2" if engine == "fsdp2" else engine.replace("zero-", "ZeRO ")


def _advice(config: RunConfig, plan: MemoryPlan, *, ranks: int, state_fits: bool) -> str:
    parameters = parameter_count(config.model)
    ways = []
    if state_fits:
        ways.append("a smaller training.micro_batch_size")
        if plan.checkpointing != "full":
            ways.append("training.activation_checkpointing: full")
    if plan.engine not in ("zero-3", "fsdp2"):
        ways.append(
            f"more ranks, on more hosts or GPUs, with engine.zero_stage: 3 (20 bytes a parameter, "
            f"{20 * parameters / GIB:.1f} GiB, over all of them together), or engine.kind: fsdp2 "
            f"(16 bytes, {16 * parameters / GIB:.1f} GiB)"
        )
    else:
        ways.append(f"more ranks than {ranks}, on more hosts or GPUs")
    return f"Take {'; '.join(ways)}; or a smaller model"
