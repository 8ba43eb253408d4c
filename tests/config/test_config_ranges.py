"""Every field: the ends of its range are accepted, what lies beyond is refused with the range.

The table is written out by hand: it is the promise that the schema has to keep.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.config import RunConfig, load_config

WriteConfig = Callable[..., Path]
Problems = Callable[..., list[str]]
Row = tuple[str, list[Any], list[Any], str]

TINY = 1e-300
BELOW_1 = 0.9999999999999999
NOTHING = 10**12

RANGES: list[Row] = [
    ("model.d_model", [8, 65536], [7, 65537, 8.0, "8"], "an integer from 8 to 65536"),
    ("model.n_layers", [1, 1024], [0, 1025], "an integer from 1 to 1024"),
    ("model.vocab_size", [2, 2**31 - 1], [1, 2**31], "an integer from 2 to 2147483647"),
    ("model.pad_vocab_size_multiple", [1, 4096], [0, 4097], "an integer from 1 to 4096"),
    ("model.pad_token_id", [0, 50279], [-1], "an integer of at least 0"),
    ("model.d_state", [1, 1024], [0, 1025], "an integer from 1 to 1024"),
    ("model.d_conv", [2, 16], [1, 17], "an integer from 2 to 16"),
    ("model.expand", [1, 16], [0, 17], "an integer from 1 to 16"),
    ("model.dt_rank", [1, 4096, "auto"], ["all", 1.5, None, True], "an integer or 'auto'"),
    ("model.headdim", [1, 1024], [0, 1025], "an integer from 1 to 1024"),
    ("model.ngroups", [1], [0, 1025], "an integer from 1 to 1024"),
    ("model.chunk_size", [1, 4096], [0, 4097], "an integer from 1 to 4096"),
    ("model.dt_min", [TINY, 0.1], [0, 1.1], "a number above 0 and at most 1"),
    ("model.dt_max", [1e-3, 10], [0, 10.1, None], "a number above 0 and at most 10"),
    ("model.dt_init_floor", [TINY, 1], [0, 1.1], "a number above 0 and at most 1"),
    ("model.dt_scale", [TINY, 100], [0, 100.1], "a number above 0 and at most 100"),
    ("model.initializer_range", [TINY, 10], [0, 10.1], "a number above 0 and at most 10"),
    ("model.norm_eps", [TINY, 0.1], [0, 0.11], "a number above 0 and at most 0.1"),
    ("model.conv_bias", [True, False], [1, "maybe", None], "true or false"),
    ("model.proj_bias", [True, False], [0, "text"], "true or false"),
    ("model.tie_embeddings", [True, False], [0.0], "true or false"),
    ("model.layer", ["mamba1", "mamba2"], ["mamba3", 1], "one of 'mamba1', 'mamba2'"),
    ("training.run_dir", ["runs/x"], [1, False], "text or null"),
    ("training.micro_batch_size", [1, 32], [0, 65537], "an integer from 1 to 65536"),
    ("training.global_batch_size", [32, 64], [0, "64"], "an integer of at least 1 or null"),
    (
        "training.gradient_accumulation_steps",
        [1, 65536],
        [0, 65537],
        "an integer from 1 to 65536 or null",
    ),
    ("training.learning_rate", [TINY, 10], [0, 10.1, "fast"], "a number above 0 and at most 10"),
    (
        "training.lr_schedule",
        ["cosine", "wsd", "linear", "constant"],
        ["step"],
        "one of 'cosine', 'wsd', 'linear', 'constant'",
    ),
    ("training.warmup_steps", [0, 1999], [-1, 2.0], "an integer of at least 0"),
    ("training.min_lr_ratio", [0, 1], [-0.1, 1.1], "a number from 0 to 1"),
    ("training.decay_share", [TINY, 1], [0, 1.1], "a number above 0 and at most 1"),
    ("training.weight_decay", [0, 10], [-0.1, 10.1], "a number from 0 to 10"),
    ("training.adam_beta1", [0, BELOW_1], [-0.1, 1], "a number of at least 0 and below 1"),
    ("training.adam_beta2", [0, BELOW_1], [-0.1, 1], "a number of at least 0 and below 1"),
    ("training.adam_eps", [TINY, 0.01], [0, 0.011], "a number above 0 and at most 0.01"),
    ("training.max_grad_norm", [TINY, 1e9, None], [0], "a number above 0 or null"),
    ("training.skip_grad_norm_above", [TINY, 1e9, None], [0], "a number above 0 or null"),
    ("training.max_skipped_steps", [1, NOTHING], [0], "an integer of at least 1"),
    ("training.max_rollbacks", [0, NOTHING], [-1, None], "an integer of at least 0"),
    ("training.spike_sigmas", [3, 1e9, None], [2.9], "a number of at least 3 or null"),
    ("training.spike_window_steps", [4, 10_000], [3, 10_001], "an integer from 4 to 10000"),
    ("training.num_epochs", [1, NOTHING], [0, 1.5], "an integer of at least 1 or null"),
    ("training.max_steps", [1001, NOTHING], [0], "an integer of at least 1 or null"),
    ("training.max_tokens", [NOTHING], [0, 1e9], "an integer of at least 1 or null"),
    ("training.eval_steps", [1, NOTHING, None], [0], "an integer of at least 1 or null"),
    ("training.eval_sequences", [1, NOTHING], [0, None], "an integer of at least 1"),
    ("training.precision", ["bf16", "fp32"], ["fp16", None], "one of 'bf16', 'fp32'"),
    (
        "training.activation_checkpointing",
        ["none", "selective", "full"],
        [True],
        "one of 'none', 'selective', 'full'",
    ),
    (
        "training.seed",
        [0, 2**63 - 1],
        [-1, 2**63],
        "an integer of at least 0 and below 9223372036854775808",
    ),
    ("training.deterministic", [True, False], ["yes"], "true or false"),
    ("data.dataset_path", ["x"], [1], "text or null"),
    ("data.sources", [], ["x", 3], "a list, each entry a mapping of its fields"),
    ("data.tokenizer_path", ["x"], [None, 1], "text"),
    ("data.sequence_length", [1, 2**24], [0, 2**24 + 1], "an integer from 1 to 16777216"),
    (
        "data.packing",
        ["concat", "best_fit", "pad"],
        ["best-fit", None],
        "one of 'concat', 'best_fit', 'pad'",
    ),
    ("data.num_workers", [0, 256], [-1, 257], "an integer from 0 to 256"),
    ("data.shuffle", [True, False], ["shuffle"], "true or false"),
    (
        "data.seed",
        [0, 2**63 - 1],
        [-1, 2**63],
        "an integer of at least 0 and below 9223372036854775808",
    ),
    ("data.train_split", [0.9], [0, 1], "a number above 0 and below 1"),
    ("data.val_split", [0.1], [0, 1], "a number above 0 and below 1"),
    ("data.tokenize_batch_documents", [1, 10**6], [0, 10**6 + 1], "an integer from 1 to 1000000"),
    ("engine.kind", ["zero", "fsdp2"], ["ddp"], "one of 'zero', 'fsdp2'"),
    ("engine.zero_stage", [0, 1, 2, 3], [-1, 4, "3"], "one of 0, 1, 2, 3 or null"),
    ("engine.reshard_after_forward", [True], ["layer"], "true or false"),
    ("engine.gather_dtype", ["fp32"], ["fp16"], "one of 'fp32', 'bf16'"),
    ("engine.reduce_dtype", ["fp32", "bf16"], ["fp16"], "one of 'fp32', 'bf16'"),
    ("engine.bucket_elements", [1, 10**10], [0, 10**10 + 1], "an integer from 1 to 10000000000"),
    ("engine.cuda_graphs", [True, False], ["graph"], "true or false"),
    ("engine.timeout_minutes", [TINY, 1440], [0, 1440.1], "a number above 0 and at most 1440"),
    (
        "engine.hang_timeout_minutes",
        [TINY, 1440, None],
        [0, 1440.1],
        "a number above 0 and at most 1440 or null",
    ),
    (
        "engine.ops_backend",
        ["auto", "reference", "torch", "cpu", "gpu", "cuda"],
        ["rocm"],
        "one of 'auto', 'reference', 'torch', 'cpu', 'gpu', 'cuda'",
    ),
    ("checkpoint.save_steps", [1, NOTHING], [0, None], "an integer of at least 1"),
    (
        "checkpoint.save_mode",
        ["auto", "async", "streaming"],
        ["background", None],
        "one of 'auto', 'async', 'streaming'",
    ),
    ("checkpoint.keep_last", [1, NOTHING], [0, None], "an integer of at least 1"),
    ("checkpoint.keep_every_steps", [1000, None], [0], "an integer of at least 1 or null"),
    (
        "checkpoint.keep_every_hours",
        [TINY, 10_000, None],
        [0, 10_001],
        "a number above 0 and at most 10000 or null",
    ),
    ("checkpoint.keep_best", [1, 1000, None], [0, 1001], "an integer from 1 to 1000 or null"),
    (
        "checkpoint.resume",
        ["auto", "required", "never"],
        [True],
        "one of 'auto', 'required', 'never'",
    ),
    (
        "checkpoint.accept_changes",
        [],
        ["seed", True],
        "a list, each entry one of 'data_mixture', 'global_batch_size'",
    ),
    ("telemetry.log_steps", [1, NOTHING], [0], "an integer of at least 1"),
    ("telemetry.tensorboard", [True, False], ["maybe"], "true or false"),
    ("telemetry.progress_bar", [True, False], [2], "true or false"),
]

# Of these exactly one may stand in a file; setting one removes the others.
RIVALS = {
    "gradient_accumulation_steps": ["global_batch_size"],
    "num_epochs": ["max_steps"],
    "max_tokens": ["max_steps"],
}


def with_value(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    document = deepcopy(document)
    section, name = path.split(".")
    for rival in RIVALS.get(name, []):
        document["training"].pop(rival)
    document.setdefault(section, {})[name] = value
    return document


def test_the_table_has_every_field_of_the_schema() -> None:
    fields = {
        f"{section}.{field}"
        for section, info in RunConfig.model_fields.items()
        if section != "schema_version"
        for field in info.annotation.model_fields
    }
    assert sorted(path for path, *_ in RANGES) == sorted(fields)


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path, accepted, _, _ in RANGES for value in accepted],
)
def test_a_value_at_the_end_of_its_range_is_accepted(
    write_config: WriteConfig, minimal: dict[str, Any], path: str, value: object
) -> None:
    config = load_config(write_config(with_value(minimal, path, value))).config
    section, name = path.split(".")
    found = getattr(getattr(config, section), name)
    if not (path == "training.run_dir" and value is None):
        assert found == value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [(path, value, expected) for path, _, refused, expected in RANGES for value in refused],
)
def test_a_value_beyond_its_range_is_refused_with_path_value_and_range(
    problems: Problems, minimal: dict[str, Any], path: str, value: object, expected: str
) -> None:
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    (line,) = problems(with_value(minimal, path, value))
    assert line.startswith(f"{path}: found {shown}, expected {expected}")
    rest = line.removeprefix(f"{path}: found {shown}, expected {expected}")
    assert rest == "" or rest.startswith("; write ")
