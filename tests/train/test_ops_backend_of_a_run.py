"""Which ops backend a run takes, and whether its micro-batches are recorded."""

import pytest
import torch

from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import BackendError
from mamba_dist.train import engines

TRAINING = {"micro_batch_size": 1, "global_batch_size": 1, "max_steps": 1, "warmup_steps": 0}


def config(*, deterministic: bool) -> RunConfig:
    return RunConfig.model_validate({"training": TRAINING | {"deterministic": deterministic}})


def test_a_fixed_order_is_refused_where_the_packages_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on a GPU where `auto` finds nothing better.
    monkeypatch.setattr(engines, "resolve_backend", lambda requested, **_: "cuda")
    assert engines.ops_backend(config(deterministic=False), device_type="cuda") == "cuda"
    with pytest.raises(BackendError, match=r"training.deterministic: .*ops_backend: gpu or torch"):
        engines.ops_backend(config(deterministic=True), device_type="cuda")


def test_a_cpu_keeps_a_fixed_order_with_any_backend() -> None:
    assert engines.ops_backend(config(deterministic=True), device_type="cpu") in {"cpu", "torch"}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"d_conv": 5}, "model.d_conv 5"),
        ({"layer": "mamba2", "d_state": 512}, "model.d_state 512"),
    ],
)
def test_a_shape_without_a_kernel_is_not_recorded_and_said_so(
    model: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    shape = RunConfig.model_validate({"training": TRAINING, "model": model})
    with caplog.at_level("INFO"):
        assert engines.microstep_recorder(shape, torch.device("cuda", 0)) is None
    assert said in caplog.text
