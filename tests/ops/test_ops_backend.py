"""Backend resolution: what `auto` takes, what is refused, what is logged."""

import logging

import pytest
import torch

from mamba_dist.errors import BackendError
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("requested", "resolved"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")]
)
def test_a_present_backend_is_resolved(requested: str, resolved: str, device_type: str) -> None:
    assert resolve_backend(requested, device_type=device_type) == resolved


@pytest.mark.parametrize("requested", ["triton", "cuda"])
def test_a_backend_of_a_later_version_is_refused_with_a_remedy(requested: str) -> None:
    with pytest.raises(BackendError, match=rf"'{requested}' is not available.*ops_backend: auto"):
        resolve_backend(requested, device_type="cpu")


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"'fast' is unknown.*auto, reference, torch, cpu"):
        resolve_backend("fast", device_type="cpu")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        resolve_backend("auto", device_type="cpu")
    assert len(caplog.messages) == 1
    assert "torch" in caplog.messages[0]
    assert "'auto' on cpu" in caplog.messages[0]


def test_an_op_refuses_a_backend_that_was_not_resolved() -> None:
    with pytest.raises(ValueError, match=r"'auto'.*reference, torch"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend="auto")
