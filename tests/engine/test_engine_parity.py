"""ZeRO 0 to 3 on one and two gloo ranks equals one plain PyTorch process (bounds of the design)."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")
CASES = [("mamba1", 2, "fp32"), ("mamba1", 2, "bf16"), ("mamba2", 2, "fp32")]
SLOW_CASES = [("mamba2", 2, "bf16"), ("mamba1", 1, "fp32"), ("mamba1", 1, "bf16")]


@pytest.mark.parametrize(
    ("layer", "world_size", "precision"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_every_stage_equals_one_plain_process(run_ranks, layer, world_size, precision) -> None:
    output = run_ranks(WORKER, layer, precision, world_size=world_size)[0]
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    parity = [r for r in results if r["case"] == "parity"]
    assert {(r["stage"], r["checkpointing"], r["recorded"]) for r in parity} == {
        *((stage, kind, False) for stage in (0, 1, 2, 3) for kind in ("none", "full")),
        (3, "selective", False),
        (0, "none", True),
    }
    for result in parity:
        assert result["loss"] <= 1e-5, result
        assert result["norm"] <= 1e-5, result
        assert result["gradient"] <= 1e-5, result
        assert result["weight_over_lr"] <= 0.05, result
        assert result["owned_elements"] == result["elements"], result
        assert result["dtypes"] == ["torch.float32"], result
    skips = [r for r in results if r["case"] in ("nan", "spike", "infinite")]
    assert {(r["stage"], r["case"], r["recorded"]) for r in skips} == {
        *((stage, case, False) for stage in (0, 1, 2, 3) for case in ("nan", "spike")),
        *((stage, "infinite", False) for stage in (0, 1, 2)),
        (0, "nan", True),
    }
    for result in skips:
        assert result["skipped"] == [False, False, True, False, False], result
        assert result["votes"] == [0, 0, world_size, 0, 0], result
        assert result["untouched"], result
        assert result["adam_steps"] == 4, result
        assert result["weight_over_lr"] <= 0.05, result
