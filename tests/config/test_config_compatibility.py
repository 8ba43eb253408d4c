"""Rules between sections, each at its border."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import (
    ConfigLoader,
    EngineConfig,
    create_default_config,
    load_config,
    validate_config_compatibility,
)
from mamba_dist.errors import ConfigError

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]

CUDA = "engine.ops_backend=cuda"
MAMBA2 = "model.layer=mamba2"


def test_the_default_config_fits_together() -> None:
    validate_config_compatibility(create_default_config())


def test_a_config_made_in_code_is_checked_too() -> None:
    config = create_default_config()
    training = config.training.model_copy(update={"precision": "fp32"})
    bad = config.model_copy(
        update={"training": training, "engine": EngineConfig(reduce_dtype="bf16")}
    )
    with pytest.raises(ConfigError, match=r"^engine\.reduce_dtype: bf16 would round"):
        validate_config_compatibility(bad)
    checkpoint = config.checkpoint.model_copy(update={"keep_every_steps": 1})
    with pytest.raises(ConfigError, match=r"^config has 2 problems:\n  engine.*\n  checkpoint"):
        validate_config_compatibility(bad.model_copy(update={"checkpoint": checkpoint}))


@pytest.mark.parametrize(
    ("precision", "reduce"), [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")]
)
def test_gradients_may_be_reduced_at_the_precision_of_the_run_or_above(
    write_config: WriteConfig, minimal: dict[str, Any], precision: str, reduce: str
) -> None:
    overrides = [f"training.precision={precision}", f"engine.reduce_dtype={reduce}"]
    load_config(write_config(minimal), overrides)


def test_fp32_gradients_are_not_reduced_in_bf16(
    problems: Problems, minimal: dict[str, Any]
) -> None:
    (line,) = problems(minimal, "training.precision=fp32", "engine.reduce_dtype=bf16")
    assert line == (
        "override engine.reduce_dtype: bf16 would round the gradients of training.precision fp32; "
        "set reduce_dtype: fp32 or precision: bf16"
    )


def test_fp32_weights_are_not_gathered_in_bf16(problems: Problems, minimal: dict[str, Any]) -> None:
    fsdp2 = ("engine.kind=fsdp2", "engine.zero_stage=null", "engine.gather_dtype=bf16")
    (line,) = problems(minimal, "training.precision=fp32", *fsdp2)
    assert "engine.gather_dtype: bf16 would round the weights of training.precision fp32" in line


@pytest.mark.parametrize(
    ("overrides", "path", "advice"),
    [
        (["kind=fsdp2", "zero_stage=3"], "engine.zero_stage", "engine.zero_stage=null"),
        (["kind=fsdp2", "bucket_elements=1000"], "engine.bucket_elements", "leave it out"),
        (["gather_dtype=bf16"], "engine.gather_dtype", "engine.reduce_dtype"),
        (["reshard_after_forward=false"], "engine.reshard_after_forward", "zero_stage: 2"),
    ],
)
def test_what_belongs_to_the_other_engine_is_refused(
    problems: Problems, minimal: dict[str, Any], overrides: list[str], path: str, advice: str
) -> None:
    (line,) = problems(minimal, *(f"engine.{override}" for override in overrides))
    assert line.startswith(f"override {path}: found ")
    assert advice in line


def test_every_field_of_a_run_survives_a_change_of_engine_there_and_back(
    write_config: WriteConfig, minimal: dict[str, Any], tmp_path: Path
) -> None:
    """The resolved config holds every field, those of the other engine too."""
    path = write_config({**minimal, "engine": {"zero_stage": 3}})
    to_fsdp2 = ["engine.kind=fsdp2", "engine.zero_stage=null"]
    changed = load_config(path, [*to_fsdp2, "engine.reshard_after_forward=false"]).config
    assert (changed.engine.kind, changed.engine.zero_stage) == ("fsdp2", None)
    resolved = tmp_path / "resolved.yaml"
    ConfigLoader.save_to_file(changed, resolved)
    assert load_config(resolved).config == changed
    back = load_config(resolved, ["engine.kind=zero", "engine.reshard_after_forward=true"]).config
    assert back.engine == EngineConfig(zero_stage=1)


@pytest.mark.parametrize(
    ("max_tokens", "fits"), [(32 * 2048 * 1000, False), (32 * 2048 * 1000 + 1, True)]
)
def test_the_warm_up_is_shorter_than_a_run_counted_in_tokens(
    problems: Problems,
    write_config: WriteConfig,
    minimal: dict[str, Any],
    max_tokens: int,
    fits: bool,
) -> None:
    override = f"training.max_tokens={max_tokens}"
    if fits:
        load_config(write_config(minimal), [override])
        return
    assert problems(minimal, override) == [
        "training.warmup_steps: found 1000, expected less than the 1000 steps of the run "
        "(max_tokens 65536000 at 65536 tokens per step)"
    ]


def test_a_run_whose_steps_depend_on_the_ranks_is_not_judged(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    overrides = ["training.max_tokens=1", "training.gradient_accumulation_steps=1"]
    load_config(write_config(minimal), overrides)


def test_a_run_that_may_have_begun_with_another_batch_size_is_not_judged(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    overrides = ["training.max_tokens=1", "checkpoint.accept_changes=[global_batch_size]"]
    load_config(write_config(minimal), overrides)


@pytest.mark.parametrize(("every", "fits"), [(500, True), (1000, True), (750, False), (250, False)])
def test_checkpoints_to_keep_are_among_those_written(
    problems: Problems, write_config: WriteConfig, minimal: dict[str, Any], every: int, fits: bool
) -> None:
    minimal["checkpoint"] = {"save_steps": 500, "keep_every_steps": every}
    if fits:
        load_config(write_config(minimal))
        return
    assert problems(minimal) == [
        f"checkpoint.keep_every_steps: found {every}, expected a multiple of "
        "checkpoint.save_steps 500: there is no checkpoint at other steps"
    ]


@pytest.mark.parametrize(
    ("validate", "fits"), [(500, True), (250, True), (1500, True), (300, False), (None, False)]
)
def test_the_best_are_kept_only_where_checkpoints_are_validated(
    problems: Problems,
    write_config: WriteConfig,
    minimal: dict[str, Any],
    validate: int | None,
    fits: bool,
) -> None:
    minimal["checkpoint"] = {"save_steps": 500, "keep_best": 1}
    minimal["training"]["eval_steps"] = validate
    if fits:
        load_config(write_config(minimal))
        return
    (line,) = problems(minimal)
    assert line.startswith("checkpoint.keep_best: checkpoints are saved every 500 steps")
    assert f"training.eval_steps is {'null' if validate is None else validate};" in line


FITS_CUDA = [
    [],
    ["model.d_conv=2"],
    ["model.d_conv=4"],
    ["model.d_model=12"],
    ["model.d_state=256"],
    [MAMBA2],
    [MAMBA2, "model.d_state=512"],
    # 128 + 2 * 2 * 2 = 136 channels: a multiple of 8 only because both groups count.
    [MAMBA2, "model.d_model=64", "model.d_state=2", "model.ngroups=2", "model.headdim=32"],
]
FAILS_CUDA = [
    (
        ["model.d_model=10"],
        "override model.d_model: the convolution has 20 channels (expand * d_model), "
        "expected a multiple of 8 for engine.ops_backend cuda",
    ),
    (
        [MAMBA2, "model.d_model=32", "model.d_state=3"],
        "override model.d_model: the convolution has 70 channels "
        "(expand * d_model + 2 * ngroups * d_state), "
        "expected a multiple of 8 for engine.ops_backend cuda",
    ),
    (
        ["model.d_conv=5"],
        "override model.d_conv: found 5, expected 2, 3 or 4 for engine.ops_backend cuda",
    ),
    (
        ["model.d_state=257"],
        "override model.d_state: found 257, expected at most 256 for engine.ops_backend cuda",
    ),
]


@pytest.mark.parametrize("overrides", FITS_CUDA)
def test_a_model_that_the_cuda_kernels_can_run_is_accepted(
    write_config: WriteConfig, minimal: dict[str, Any], overrides: list[str]
) -> None:
    load_config(write_config(minimal), [CUDA, *overrides])


@pytest.mark.parametrize(("overrides", "message"), FAILS_CUDA)
def test_a_model_that_the_cuda_kernels_cannot_run_is_refused_for_cuda_only(
    problems: Problems,
    write_config: WriteConfig,
    minimal: dict[str, Any],
    overrides: list[str],
    message: str,
) -> None:
    load_config(write_config(minimal), overrides)
    assert problems(minimal, CUDA, *overrides) == [message]


# d_model 1024: in_proj gives 2 * 2048 = 2^12 channels; times 2^19 positions is 2^31, one too many.
WIDE = ["model.d_model=1024", "training.micro_batch_size=1", "training.global_batch_size=1"]


def test_a_batch_that_32_bits_can_address_is_accepted_by_cuda(
    write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    overrides = [CUDA, *WIDE, f"data.sequence_length={2**19 - 1}"]
    load_config(write_config(minimal), overrides)
    load_config(write_config(minimal), [*WIDE, f"data.sequence_length={2**19}"])


def test_a_batch_beyond_32_bits_is_refused_for_cuda(
    problems: Problems, minimal: dict[str, Any]
) -> None:
    (line,) = problems(minimal, CUDA, *WIDE, f"data.sequence_length={2**19}")
    assert line == (
        "override training.micro_batch_size: found 1: batch * data.sequence_length 524288 * "
        "4096 channels = 2147483648 elements, above the 2147483647 that engine.ops_backend cuda "
        "can address; expected data.sequence_length of at most 524287"
    )
    minimal["model"] = {"d_model": 1024}
    minimal["training"]["micro_batch_size"] = 32
    minimal["data"] = {"sequence_length": 2**17}
    (line,) = problems(minimal, CUDA)
    assert line.endswith("expected at most 3 for this length")


def test_the_projection_of_mamba2_counts_with_its_states_and_heads(
    problems: Problems, write_config: WriteConfig, minimal: dict[str, Any]
) -> None:
    # 2 * 2048 + 2 * 2 * 128 + 32 = 4640 channels.
    shape = [CUDA, *WIDE, MAMBA2, "model.ngroups=2"]
    largest = (2**31 - 1) // 4640
    load_config(write_config(minimal), [*shape, f"data.sequence_length={largest}"])
    (line,) = problems(minimal, *shape, f"data.sequence_length={largest + 1}")
    assert f"* 4640 channels = {4640 * (largest + 1)} elements" in line
    assert line.endswith(f"data.sequence_length of at most {largest}")


def test_every_broken_rule_is_listed(problems: Problems, minimal: dict[str, Any]) -> None:
    minimal["model"] = {"d_conv": 5, "d_state": 300}
    minimal["training"]["precision"] = "fp32"
    minimal["engine"] = {"ops_backend": "cuda", "reduce_dtype": "bf16"}
    assert [line.split(":")[0] for line in problems(minimal)] == [
        "engine.reduce_dtype",
        "model.d_conv",
        "model.d_state",
    ]
