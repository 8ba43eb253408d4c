"""The private parts of DeepSpeed that the engine touches are still what it takes them for.

When this fails after an upgrade, `mamba_dist/engine/zero.py` or `world.py` must be adapted before
anything else is believed.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("canary_worker.py")
NAMES = [
    "deepspeed.ops.__compatible_ops__",
    "stage 0: ZeroEngine",
    "stage 0: DeepSpeedEngine",
    "stage 0: veto",
    "stage 0: reduction",
    "stage 1: ZeroEngine",
    "stage 1: DeepSpeedEngine",
    "stage 1: shared masters",
    "stage 1: flat masters",
    "stage 1: _hp_mapping",
    "stage 1: veto",
    "stage 1: update_lp_params",
    "stage 2: ZeroEngine",
    "stage 2: DeepSpeedEngine",
    "stage 2: shared masters",
    "stage 2: flat masters",
    "stage 2: _hp_mapping",
    "stage 2: veto",
    "stage 2: update_lp_params",
    "stage 3: ZeroEngine",
    "stage 3: DeepSpeedEngine",
    "stage 3: leaf modules",
    "stage 3: ds_tensor, ds_numel, ds_shape",
    "stage 3: _get_norm_groups",
    "stage 3: veto",
]


def advice(name: str, found: object) -> str:
    return (
        f"DeepSpeed {version('deepspeed')} is not what mamba_dist/engine relies on, at {name}:\n"
        f"{found}"
    )


def test_deepspeed_still_has_the_private_parts_that_the_engine_touches(run_ranks) -> None:
    output = run_ranks(WORKER, world_size=1)[0]
    found = {
        line["check"]: line["found"]
        for line in map(json.loads, (x for x in output.splitlines() if x.startswith("{")))
    }
    changed = [advice(name, found[name]) for name in NAMES if found.get(name) is not None]
    if changed:
        pytest.fail("\n\n".join(changed), pytrace=False)
    assert list(found) == [*NAMES, "/dev/shm"]
    assert found["/dev/shm"] == [], "DeepSpeed left shared memory behind, see world.py: _SHM_OP"
