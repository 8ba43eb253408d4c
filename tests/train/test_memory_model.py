"""The memory model against what engines allocate on CPUs, block by block."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_cases import run_config

from mamba_dist.config.load import load_config
from mamba_dist.config.schema import RunConfig
from mamba_dist.train.memory import MemoryPlan, memory_plan

WORKER = Path(__file__).with_name("memory_worker.py")
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]
Measure = Callable[..., list[dict[str, int]]]

# Buckets of less than a layer: with those of the default the model would be a fraction of them.
SMALL_BUCKETS = {"bucket_elements": 300_000}
ENGINES: list[dict[str, Any]] = [
    *({"zero_stage": stage, **SMALL_BUCKETS} for stage in (0, 1, 2, 3)),
    {"kind": "fsdp2"},
]


@pytest.fixture(scope="module")
def measure(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Runs cases in one launch under the counting allocator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the counting allocator")
    library = tmp_path_factory.mktemp("allocator") / "counting.so"
    source = WORKER.with_name("counting_allocator.cpp")
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)

    def run(cases: list[Case], *, world_size: int) -> list[dict[str, int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(library))
            output = run_ranks(WORKER, json.dumps(cases), world_size=world_size)[0]
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    return run


def planned(case: Case, *, world_size: int) -> tuple[RunConfig, MemoryPlan]:
    config = run_config(*case)
    return config, memory_plan(config, ranks=world_size, on_gpu=False)


def agree(case: Case, found: dict[str, int], *, world_size: int) -> None:
    _, plan = planned(case, world_size=world_size)
    peak = max(found["passes"], found["update"])
    assert plan.peak - plan.process == pytest.approx(peak, rel=0.15), (case, plan, found)
    # Else a run that fits would be refused.
    assert plan.certain <= 1.001 * peak, (case, plan, found)
    if plan.engine != "zero-3" and case[0].get("reshard_after_forward", True):
        # Stage 3 holds its part of the gradients at rest, too.
        at_rest = plan.state.parameters + plan.state.optimizer
        assert at_rest == pytest.approx(found["at_rest"], rel=0.03), (case, plan, found)
    # Copies of all weights in bf16, until the end of a forward pass: training or evaluation.
    assert case[2]["precision"] != "bf16" or not found["caches"], case
    if plan.engine != "zero-1":
        # No activations are left then. Stage 1 has given up the whole gradients by now.
        update = plan.state.certain + plan.state.flattened
        update += plan.state.buffers if plan.engine == "zero-3" else 0
        # What stage 0 flattened in the step before may wait for Python's collector of cycles.
        uncollected = plan.state.flattened if plan.engine == "zero-0" else 0
        least, most = 0.88 * found["update"] - uncollected, 1.12 * found["update"]
        assert least <= update <= most, (case, plan, found)


def activation_cases(*layers: str) -> list[Case]:
    return [
        (
            {"zero_stage": 0},
            {"layer": layer, "n_layers": 3},
            {
                "micro_batch_size": 2,
                "precision": precision,
                "activation_checkpointing": checkpointing,
            },
            256,
        )
        for layer in layers
        for precision in ("fp32", "bf16")
        for checkpointing in ("none", "selective", "full")
    ]


def test_activations_are_those_that_a_forward_pass_keeps(measure: Measure) -> None:
    cases = activation_cases("mamba1", "mamba2")
    # The head's gradients are what a small model with a large vocabulary mostly takes.
    cases.append(
        (
            {"zero_stage": 0},
            {"n_layers": 1, "vocab_size": 20_000},
            {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "precision": "fp32"},
            64,
        )
    )
    for case, found in zip(cases, measure(cases, world_size=1), strict=True):
        agree(case, found, world_size=1)
        _, plan = planned(case, world_size=1)
        kept = found["forward"] - found["at_rest"]
        expected = plan.activations.layers + plan.activations.rounded_weights
        expected += plan.state.carried_gradients
        # What the head keeps comes on top.
        most = 1.02 * (expected + plan.activations.head)
        assert expected <= kept <= most, (case, plan, found)


def engine_cases(*layers: str, accumulation: tuple[int, ...]) -> list[Case]:
    return [
        (
            engine,
            {"layer": layer},
            {
                "micro_batch_size": 1,
                "gradient_accumulation_steps": steps,
                "precision": "fp32",
                "activation_checkpointing": "full",
            },
            64,
        )
        for layer in layers
        for engine in ENGINES
        for steps in accumulation
    ]


def test_every_stage_holds_what_the_plan_says(measure: Measure) -> None:
    cases = engine_cases("mamba1", accumulation=(2,))
    for case, found in zip(cases, measure(cases, world_size=2), strict=True):
        agree(case, found, world_size=2)


@pytest.mark.slow
def test_every_stage_holds_what_the_plan_says_in_more_cases(measure: Measure) -> None:
    cases = engine_cases("mamba1", accumulation=(1,))
    cases += engine_cases("mamba2", accumulation=(1, 2))
    fsdp2 = {"kind": "fsdp2", "reshard_after_forward": False}
    cases += [(fsdp2, *case[1:]) for case in cases[:1]]
    for case, found in zip(cases, measure(cases, world_size=2), strict=True):
        agree(case, found, world_size=2)


@pytest.mark.slow
def test_nothing_certain_is_more_than_other_backends_take(measure: Measure) -> None:
    cases = [
        ({**case[0], "ops_backend": "torch"}, *case[1:])
        for case in activation_cases("mamba1", "mamba2")
    ]
    for case, found in zip(cases, measure(cases, world_size=1), strict=True):
        _, plan = planned(case, world_size=1)
        assert plan.certain <= max(found["passes"], found["update"]), (case, plan, found)


# Peaks of tools/BENCHMARKS.md, allocated by torch on an H100 with CUDA graphs on one rank.
ON_AN_H100 = [
    ("130m", "none", 16, 1, 19.6),
    ("370m", "none", 8, 1, 28.4),
    ("1b", "selective", 8, 1, 52.2),
    ("1b", "selective", 4, 1, 35.6),
    ("1b", "selective", 4, 4, 40.7),
    ("130m-mamba2", "none", 16, 1, 18.1),
    ("370m-mamba2", "none", 8, 1, 26.2),
    ("1b-mamba2", "selective", 8, 1, 52.5),
    ("1b-mamba2", "selective", 4, 1, 35.5),
]


@pytest.mark.parametrize(("name", "checkpointing", "rows", "steps", "gib"), ON_AN_H100)
def test_peaks_on_a_gpu_are_those_that_were_measured(
    name: str, checkpointing: str, rows: int, steps: int, gib: float
) -> None:
    root = Path(__file__).parents[2]
    config = load_config(
        root / f"configs/{name}.yaml",
        [
            f"training.activation_checkpointing={checkpointing}",
            f"training.micro_batch_size={rows}",
            "training.global_batch_size=null",
            f"training.gradient_accumulation_steps={steps}",
        ],
    ).config
    plan = memory_plan(config, ranks=1, on_gpu=True)
    assert (plan.peak - plan.process) / 2**30 == pytest.approx(gib, rel=0.05)
