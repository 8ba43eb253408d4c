"""Backend resolution: what `auto` takes, what is refused and why, what is logged."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import fake_cuda_packages
import fake_nvrtc
import platformdirs
import pytest
import torch

from mamba_dist.errors import BackendError
from mamba_dist.ops import backend
from mamba_dist.ops.backend import BackendStatus, describe_backends, resolve_backend
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.native.library import load_kernel
from mamba_dist.ops.nvrtc import compiler
from mamba_dist.ops.nvrtc import kernel as nvrtc_kernel


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine without a compiler on which no kernel has been built yet."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_: tmp_path / "cache")
    load_kernel.cache_clear()
    yield
    load_kernel.cache_clear()


@pytest.fixture
def gpu_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where backend gpu does not work, whichever this one is."""

    def refuse() -> None:
        raise BackendError("backend gpu lacks something")

    monkeypatch.setattr(nvrtc_kernel, "require_device", refuse)


@pytest.fixture
def gpu_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine where backend gpu works and the packages are missing, whichever this one is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    fake_nvrtc.install(monkeypatch)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_: tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)


_find_nvrtc = compiler._library.__wrapped__


def _lose_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_library", _find_nvrtc)
    monkeypatch.setattr(torch.version, "cuda", "99.0")


def _break_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "empty.cu(1): error: first\nempty.cu(2): error: second"
    monkeypatch.setattr(compiler._library(), "error", words)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_what_runs_anywhere_is_resolved_by_name(name: str, device_type: str) -> None:
    assert resolve_backend(name, device_type=device_type) == name


def test_auto_on_a_cpu_takes_the_native_kernels_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert resolve_backend("auto", device_type="cpu") == "cpu"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "cpu (native kernels), asked for 'auto' on cpu" in record.getMessage()


@pytest.mark.usefixtures("no_compiler")
def test_auto_without_a_compiler_takes_torch_and_says_why_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert resolve_backend("auto", device_type="cpu") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "torch (chunked, plain PyTorch), asked for 'auto' on cpu" in record.getMessage()
    assert "needs a C++ compiler" in record.getMessage()
    assert "apt install g++" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.usefixtures("no_compiler")
def test_the_native_kernels_asked_for_without_a_compiler_say_what_to_install() -> None:
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        resolve_backend("cpu", device_type="cpu")


def test_a_kernel_source_left_out_of_the_installation_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "_KERNEL_SOURCES", (tmp_path / "scan" / "cpu.cpp",))
    with pytest.raises(BackendError, match=r"scan/cpu.cpp; reinstall mamba-dist"):
        resolve_backend("cpu", device_type="cpu")


@pytest.mark.usefixtures("gpu_works")
def test_auto_on_a_gpu_takes_our_own_kernels_if_they_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert resolve_backend("auto", device_type="cuda") == "gpu"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "gpu (our own kernels, " in record.getMessage()
    assert "because" not in record.getMessage()


@pytest.mark.usefixtures("gpu_works")
@pytest.mark.parametrize(
    ("remove", "reason"),
    [
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "needs a CUDA device"),
        (
            lambda m: m.setattr(torch.cuda, "get_device_capability", lambda: (7, 5)),
            "needs compute capability 8.0 (Ampere) or newer, and this device has 7.5",
        ),
        (_lose_nvrtc, "needs libnvrtc.so.99"),
        (_break_nvrtc, "could not compile empty.cu"),
        (lambda m: m.setitem(sys.modules, "triton", None), "cannot import triton"),
    ],
    ids=["no device", "an old device", "no NVRTC", "a kernel does not compile", "no triton"],
)
def test_auto_on_a_gpu_where_our_own_kernels_lack_something_says_what_in_one_line(
    remove: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remove(monkeypatch)
    with caplog.at_level(logging.INFO, logger="mamba_dist.ops.backend"):
        assert resolve_backend("auto", device_type="cuda") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()
    (status,) = (s for s in describe_backends("cuda") if s.name == "gpu")
    assert not status.available
    assert reason in status.detail
    with pytest.raises(BackendError, match=r"engine\.ops_backend: torch"):
        resolve_backend("gpu", device_type="cuda")


@pytest.mark.usefixtures("gpu_refused")
def test_auto_on_a_gpu_takes_the_packages_if_they_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cuda_packages.install(monkeypatch)
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert resolve_backend("auto", device_type="cuda") == "cuda"
        assert resolve_backend("cuda", device_type="cuda") == "cuda"
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.INFO]


@pytest.mark.usefixtures("gpu_refused")
@pytest.mark.parametrize(
    "missing",
    [
        "causal_conv1d",
        "mamba_ssm.ops.selective_scan_interface",
        "mamba_ssm.ops.triton.ssd_combined",
    ],
)
def test_auto_on_a_gpu_without_one_of_the_packages_takes_torch_and_says_why_in_one_line(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_cuda_packages.install(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert resolve_backend("auto", device_type="cuda") == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert missing in record.getMessage()
    assert "pip install 'mamba-ssm>=2.3' 'causal-conv1d>=1.5'" in record.getMessage()


@pytest.mark.parametrize(
    "problem",
    [
        "raise OSError('undefined symbol: _ZN3c10')",
        "raise RuntimeError('built for another CUDA')",
        "raise ImportError('no selective_scan_cuda')",
    ],
)
def test_packages_that_are_there_but_broken_give_their_cause(
    problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(problem)
    monkeypatch.syspath_prepend(str(tmp_path))
    cause = problem.split("'")[1]
    with pytest.raises(BackendError, match=rf"{cause}.*pip install 'mamba-ssm"):
        resolve_backend("cuda", device_type="cuda")


@pytest.mark.parametrize(("name", "device_type"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_backend_for_another_device_is_refused(name: str, device_type: str) -> None:
    with pytest.raises(BackendError, match=rf"'{name}' needs device type '{name}'.*backend: auto"):
        resolve_backend(name, device_type=device_type)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        BackendError, match=r"'fast' is unknown.*auto, reference, torch, cpu, gpu, cuda"
    ):
        resolve_backend("fast", device_type="cpu")


def test_each_backend_is_described_as_working_or_with_what_it_needs() -> None:
    on_cpu = {status.name: status for status in describe_backends("cpu")}
    assert [s.available for s in on_cpu.values()] == [True, True, True, False, False]
    assert on_cpu["cpu"] == BackendStatus("cpu", available=True, detail="native kernels")
    assert "needs device type 'cuda'" in on_cpu["gpu"].detail
    assert "needs device type 'cuda'" in on_cpu["cuda"].detail


@pytest.mark.usefixtures("no_compiler")
def test_a_backend_that_lacks_something_is_described_with_the_install_line() -> None:
    (status,) = (s for s in describe_backends("cpu") if s.name == "cpu")
    assert not status.available
    assert "apt install g++" in status.detail


def test_an_op_refuses_a_backend_that_was_not_resolved() -> None:
    with pytest.raises(ValueError, match=r"'auto'.*reference, torch, cpu, gpu, cuda"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend="auto")
