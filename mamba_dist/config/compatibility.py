"""Rules between sections that the config alone decides; rules inside a section stand in the schema.

E d_inner, G groups, H heads, K d_conv, N d_state.
"""

import math

from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.report import Problem, config_error
from mamba_dist.config.schema import MambaConfig, RunConfig

_INT32_MAX = 2**31 - 1
# csrc/causal_conv1d.cpp of causal-conv1d: channels-last input wants both.
_CONV_CHANNEL_MULTIPLE = 8
_CONV_WIDTHS = range(2, 5)
# csrc/selective_scan/selective_scan.cpp of mamba-ssm keeps a whole state per thread block.
_SCAN_MAX_STATE = 256


def validate_config_compatibility(config: RunConfig) -> None:
    """Returns if the sections of `config` fit each other.

    Raises:
        ConfigError: they do not; lists every rule that is broken.
    """
    if problems := compatibility_problems(config):
        raise config_error(problems, source="")


def compatibility_problems(config: RunConfig) -> list[Problem]:
    """The broken rules, in the order of the sections."""
    problems = [
        *_engine_kind(config),
        *_precision_problems(config),
        *_length_problems(config),
        *_retention(config),
    ]
    if config.engine.ops_backend == "cuda":
        problems += [*_kernel_problems(config.model), *_offset_problems(config)]
    return problems


def _engine_kind(config: RunConfig) -> list[Problem]:
    """Fields of one engine that are set for the other; what is at its default says nothing."""
    engine, default = config.engine, EngineConfig()
    problems = []
    if engine.kind == "zero":
        if not engine.reshard_after_forward:
            problems.append(
                Problem(
                    "engine.reshard_after_forward",
                    "found false, which is for engine.kind fsdp2; leave it out, and take "
                    "zero_stage: 2 to keep parameters whole",
                )
            )
        if engine.gather_dtype == "bf16":
            problems.append(
                Problem(
                    "engine.gather_dtype",
                    "found bf16, which is for engine.kind fsdp2; leave it out: zero_stage 3 "
                    "gathers in engine.reduce_dtype",
                )
            )
        return problems
    if engine.zero_stage is not None:
        problems.append(
            Problem(
                "engine.zero_stage",
                f"found {engine.zero_stage}, but engine.kind fsdp2 has no stages: it always shards "
                "parameters, gradients and AdamW's state; leave it out, or set it to null "
                "(engine.zero_stage=null)",
            )
        )
    if engine.bucket_elements != default.bucket_elements:
        problems.append(
            Problem(
                "engine.bucket_elements",
                f"found {engine.bucket_elements}, but engine.kind fsdp2 reduces the gradients of "
                "a layer at once; leave it out",
            )
        )
    return problems


def _precision_problems(config: RunConfig) -> list[Problem]:
    if config.training.precision == "bf16":
        return []
    return [
        Problem(
            f"engine.{field}",
            f"bf16 would round the {what} of training.precision fp32; "
            f"set {field}: fp32 or precision: bf16",
        )
        for field, what in (("reduce_dtype", "gradients"), ("gather_dtype", "weights"))
        if getattr(config.engine, field) == "bf16"
    ]


def _length_problems(config: RunConfig) -> list[Problem]:
    training = config.training
    if training.max_tokens is None or training.global_batch_size is None:
        return []
    if "global_batch_size" in config.checkpoint.accept_changes:
        return []  # its first steps may have had another size: only the checkpoint knows
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    steps = math.ceil(training.max_tokens / tokens_per_step)
    if training.warmup_steps < steps:
        return []
    return [
        Problem(
            "training.warmup_steps",
            f"found {training.warmup_steps}, expected less than the {steps} steps of the run "
            f"(max_tokens {training.max_tokens} at {tokens_per_step} tokens per step)",
        )
    ]


def _retention(config: RunConfig) -> list[Problem]:
    problems = []
    every, save = config.checkpoint.keep_every_steps, config.checkpoint.save_steps
    if every is not None and every % save:
        problems.append(
            Problem(
                "checkpoint.keep_every_steps",
                f"found {every}, expected a multiple of checkpoint.save_steps {save}: "
                "there is no checkpoint at other steps",
            )
        )
    validate = config.training.eval_steps
    if config.checkpoint.keep_best is not None and (
        validate is None or (save % validate and validate % save)
    ):
        problems.append(
            Problem(
                "checkpoint.keep_best",
                f"checkpoints are saved every {save} steps (save_steps) and training.eval_steps is "
                f"{'null' if validate is None else validate}; expected one to be a multiple of the "
                "other, since only a checkpoint of a validated step has a loss to compare",
            )
        )
    return problems


def _kernel_problems(model: MambaConfig) -> list[Problem]:
    problems = []
    is_mamba1 = model.layer == "mamba1"
    channels = model.d_inner if is_mamba1 else model.d_inner + 2 * model.ngroups * model.d_state
    if channels % _CONV_CHANNEL_MULTIPLE:
        parts = "expand * d_model" if is_mamba1 else "expand * d_model + 2 * ngroups * d_state"
        problems.append(
            Problem(
                "model.d_model",
                f"the convolution has {channels} channels ({parts}), expected a multiple of "
                f"{_CONV_CHANNEL_MULTIPLE} for engine.ops_backend cuda",
            )
        )
    if model.d_conv not in _CONV_WIDTHS:
        problems.append(
            Problem(
                "model.d_conv",
                f"found {model.d_conv}, expected 2, 3 or 4 for engine.ops_backend cuda",
            )
        )
    if is_mamba1 and model.d_state > _SCAN_MAX_STATE:
        problems.append(
            Problem(
                "model.d_state",
                f"found {model.d_state}, expected at most {_SCAN_MAX_STATE} "
                "for engine.ops_backend cuda",
            )
        )
    return problems


def _offset_problems(config: RunConfig) -> list[Problem]:
    """mamba-ssm addresses elements with 32 bits and is silently wrong beyond (its issue 1015)."""
    model, data, training = config.model, config.data, config.training
    # The widest tensor a kernel walks through is the output of in_proj.
    width = 2 * model.d_inner
    if model.layer == "mamba2":
        width += 2 * model.ngroups * model.d_state + model.n_heads
    elements = training.micro_batch_size * data.sequence_length * width
    if elements <= _INT32_MAX:
        return []
    fitting = _INT32_MAX // (data.sequence_length * width)
    advice = (
        f"at most {fitting} for this length"
        if fitting
        else f"data.sequence_length of at most {_INT32_MAX // width}"
    )
    return [
        Problem(
            "training.micro_batch_size",
            f"found {training.micro_batch_size}: batch * data.sequence_length "
            f"{data.sequence_length} * {width} channels = {elements} elements, above the "
            f"{_INT32_MAX} that engine.ops_backend cuda can address; expected {advice}",
        )
    ]
