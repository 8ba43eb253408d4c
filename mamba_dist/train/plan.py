"""The resolved plan of a run, in words, without training anything."""

from mamba_dist.config.batch import batch_plan
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import Segment, shares
from mamba_dist.data.training_sources import new_run
from mamba_dist.model.flops import flops_per_token, parameter_count
from mamba_dist.train.build import open_matching_sources, planned_steps
from mamba_dist.train.memory import GIB, MemoryPlan, memory_plan
from mamba_dist.train.run_folder import run_folder


def describe_plan(config: RunConfig, *, world_size: int) -> str:
    """What would be trained on `world_size` ranks, on what, for how long.

    Raises:
        ConfigError: the config contradicts the data or the number of ranks.
        DataError: the data set cannot be opened.
    """
    plan = batch_plan(config, world_size)
    sources = open_matching_sources(config)
    data = new_run(sources, config.data, global_batch_size=plan.global_batch_size)
    steps = planned_steps(config, data.order)
    step_tokens = plan.global_batch_size * config.data.sequence_length
    parameters = parameter_count(config.model)
    cost = flops_per_token(config.model, sequence_length=config.data.sequence_length)
    [segment] = data.order.segments
    epochs = steps * plan.global_batch_size / sum(source.samples for source in segment.sources)
    model, training = config.model, config.training
    memory = memory_plan(config, ranks=world_size, on_gpu=False)
    rows = {
        "run folder": str(run_folder(config)),
        "model": f"{model.layer}, d_model {model.d_model}, {model.n_layers} layers, "
        f"{parameters:,} parameters",
        "engine": f"{_engine(config, memory)} on {world_size} ranks, {training.precision}, "
        f"activation checkpointing {training.activation_checkpointing}",
        "training state": f"{memory.state.certain / GIB:.3f} GiB a rank: "
        "parameters, gradients, AdamW's moments",
        "memory": f"{memory.peak / GIB:.2f} GiB a rank at the peak, about, on a CPU; "
        "tools/plan.py compares stages, and plans for GPUs",
        "batch": f"{plan.micro_batch_size} x {plan.accumulation_steps} micro-batches x "
        f"{world_size} ranks = {plan.global_batch_size} sequences, {step_tokens:,} tokens per step",
        "data": _described(segment, config.data.sequence_length)
        + f", packing {config.data.packing}",
        "length": f"{steps:,} steps, {steps * step_tokens:,} tokens, {epochs:.2f} epochs",
        "learning rate": f"{training.learning_rate:g}, {training.lr_schedule}, "
        f"{training.warmup_steps} warm-up steps",
        "work": f"{cost.total_flops:,} FLOPs per token, "
        f"{cost.total_flops * steps * step_tokens:.2e} FLOPs in all",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows.items())


def _engine(config: RunConfig, memory: MemoryPlan) -> str:
    """Which engine would run."""
    chosen = config.engine
    if chosen.kind == "fsdp2":
        kept = "" if chosen.reshard_after_forward else " (parameters stay after the forward pass)"
        return f"FSDP2{kept}"
    stage, asked = memory.engine.removeprefix("zero-"), chosen.zero_stage
    return f"ZeRO {stage}" + (
        "" if stage == str(asked) else f" (one rank shares nothing: not {asked})"
    )


def _described(segment: Segment, sequence_length: int) -> str:
    share = shares(segment.sources)
    sources = [
        f"{source.path}: {source.samples:,} training sequences of {sequence_length} tokens"
        + f", {float(share[source.fingerprint]):.4%} of the samples" * (len(share) > 1)
        + ("" if source.max_epochs is None else f", max_epochs {source.max_epochs}")
        for source in segment.sources
    ]
    return "; ".join(sources)
