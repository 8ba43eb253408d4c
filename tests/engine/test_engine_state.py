"""Engine state through real checkpoints: resumed is bit-exact, and any engine reads any other."""

import json
from pathlib import Path

WORKER = Path(__file__).with_name("state_worker.py")


def results_of(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_state_survives_a_checkpoint_with_every_engine_and_between_engines_and_worlds(
    run_ranks, tmp_path: Path
) -> None:
    written = results_of(run_ranks(WORKER, "write", str(tmp_path), world_size=2)[0])
    resumed = [r for r in written if r["case"] == "resume"]
    assert [r["kind"] for r in resumed] == [0, 1, 2, 3, "fsdp2"]
    for result in resumed:
        assert result["same_evaluation"], result
        assert result["same_after_damage"], result
        assert result["same_losses"], result
        assert result["same_weights"], result
    loads = [r for r in written if r["case"] == "load"]
    assert len(loads) == 25
    for result in loads:
        assert result["same"], result
    read = results_of(run_ranks(WORKER, "read", str(tmp_path), world_size=1)[0])
    assert len(read) == 5
    for result in read:
        assert result["same"], result
