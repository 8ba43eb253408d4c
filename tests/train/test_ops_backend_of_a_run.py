"""Which ops backend a run takes."""

import pytest

from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import BackendError
from mamba_dist.train import build

TRAINING = {"micro_batch_size": 1, "global_batch_size": 1, "max_steps": 1, "warmup_steps": 0}


def config(*, deterministic: bool) -> RunConfig:
    return RunConfig.model_validate({"training": TRAINING | {"deterministic": deterministic}})


def test_a_fixed_order_is_refused_where_the_packages_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a GPU where `auto` finds nothing better.
    monkeypatch.setattr(build, "resolve_backend", lambda requested, *, device_type: "cuda")
    assert build.ops_backend(config(deterministic=False), device_type="cuda") == "cuda"
    with pytest.raises(BackendError, match=r"training.deterministic: .*ops_backend: gpu or torch"):
        build.ops_backend(config(deterministic=True), device_type="cuda")


def test_a_cpu_keeps_a_fixed_order_with_any_backend() -> None:
    assert build.ops_backend(config(deterministic=True), device_type="cpu") in {"cpu", "torch"}
