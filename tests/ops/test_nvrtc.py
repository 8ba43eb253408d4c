"""CUDA kernels without a toolkit: what is kept of compiling them, and what is said and done."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvrtc
import platformdirs
import pytest
import torch
from fake_nvrtc import FakeNvrtc

from mamba_dist.errors import BackendError
from mamba_dist.ops.nvrtc import compiler, kernel
from mamba_dist.ops.nvrtc.compiler import compiled
from mamba_dist.ops.nvrtc.kernel import Kernel, launch

HOPPER = (9, 0)
SHARED_BYTES = 227 * 1024


class Call(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64),)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    return fake_nvrtc.install(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A kernel with a header of its own."""
    folder = tmp_path / "answer"
    folder.mkdir()
    (folder / "number.cuh").write_text("#define NUMBER 1\n")
    (folder / "gpu.cu").write_text('#include "number.cuh"\n#include "device.cuh"\n')
    return folder / "gpu.cu"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernels' folder of this test alone, which is not there yet."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_: tmp_path / "cache")
    return tmp_path / "cache" / "gpu-kernels"


def test_a_kernel_is_compiled_once(nvrtc: FakeNvrtc, source: Path, cache: Path) -> None:
    image = compiled(source, ("-DA=1",), HOPPER)
    assert compiled(source, ("-DA=1",), HOPPER) == image
    assert nvrtc.compilations == 1
    (kept,) = cache.iterdir()
    assert kept.name.startswith("answer-gpu-sm90-")


def test_whatever_a_kernel_is_made_of_makes_it_another_one(
    nvrtc: FakeNvrtc, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(source, ("-DA=1",), HOPPER)
    compiled(source, ("-DA=2",), HOPPER)
    compiled(source, ("-DA=1",), (8, 0))
    (source.parent / "number.cuh").write_text("#define NUMBER 2\n")
    compiled(source, ("-DA=1",), HOPPER)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    compiled(source, ("-DA=1",), HOPPER)
    assert nvrtc.compilations == len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "longer"])
def test_a_damaged_kernel_is_compiled_again_and_replaced(
    damage: str, nvrtc: FakeNvrtc, source: Path, cache: Path
) -> None:
    image = compiled(source, (), HOPPER)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": whole[:-1],
        "flipped": bytes([whole[0] ^ 1]) + whole[1:],
        "longer": whole + b"x",
    }
    kept.write_bytes(damaged[damage])
    assert compiled(source, (), HOPPER) == image
    assert kept.read_bytes() == whole
    assert nvrtc.compilations == 2


def test_a_folder_in_a_kernels_place_costs_only_the_cache(
    nvrtc: FakeNvrtc, source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = compiled(source, (), HOPPER)
    (kept,) = cache.iterdir()
    kept.unlink()
    kept.mkdir()
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert compiled(source, (), HOPPER) == image
    assert f"{kept.name} is not kept" in caplog.text
    assert list(cache.iterdir()) == [kept]


def test_without_a_place_for_the_cache_each_start_compiles(
    nvrtc: FakeNvrtc, source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO, logger="mamba_dist"):
        assert compiled(source, (), HOPPER) == compiled(source, (), HOPPER)
    assert nvrtc.compilations == 2
    assert "there is no cache folder" in caplog.text


def test_a_write_that_fails_leaves_nothing_behind(
    nvrtc: FakeNvrtc, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    assert len(compiled(source, (), HOPPER)) == fake_nvrtc.IMAGE_BYTES
    assert list(cache.iterdir()) == []


def _compile_and_remove(source: Path, expected: bytes, cache: Path) -> None:
    for _ in range(30):
        assert compiled(source, (), HOPPER) == expected
        for kept in cache.glob("*.cubin"):
            kept.unlink(missing_ok=True)


@pytest.mark.usefixtures("nvrtc")
def test_several_processes_at_once_all_get_whole_kernels(source: Path, cache: Path) -> None:
    image = compiled(source, (), HOPPER)
    # Forked, so that they have the stand-in too.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_compile_and_remove, args=(source, image, cache)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("cache")
def test_a_kernel_that_does_not_compile_is_named_with_the_compilers_words(
    nvrtc: FakeNvrtc, source: Path
) -> None:
    nvrtc.error = "gpu.cu(3): error: identifier is undefined"
    with pytest.raises(
        BackendError,
        match=r"(?s)NVRTC 12\.9 could not compile gpu\.cu of answer with .*-DA=1.*sm_90.*"
        r"gpu\.cu\(3\): error: identifier is undefined.*ops_backend: torch",
    ):
        compiled(source, ("-DA=1",), HOPPER)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"needs a CUDA build of torch, and this is .*ops_backend: torch"),
        ("99.1", r"needs libnvrtc\.so\.99.*pip install 'nvidia-cuda-nvrtc==99.*ops_backend: torch"),
    ],
)
def test_a_missing_nvrtc_is_named_with_what_to_install(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(BackendError, match=message):
        compiler._library.__wrapped__()


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch brings no NVRTC")
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_nvrtc_itself_compiles_for_gpus_that_are_not_there(capability: tuple[int, int]) -> None:
    image = compiled(kernel._EMPTY.source, kernel._EMPTY.options, capability)
    assert image.startswith(b"\x7fELF")


class FakeDriver:
    """Notes the driver's calls; each returns its next status in `statuses`, then success."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.statuses: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return self.statuses[name].pop(0) if self.statuses.get(name) else 0

        return function

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]

    def launched(self, *, argument: int) -> list[Any]:
        """One of the arguments of each cuLaunchKernel."""
        return [arguments[argument] for arguments in self.arguments("cuLaunchKernel")]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Two GPUs like an H100, with a driver that only notes what it is asked for."""
    current = [0]

    @contextlib.contextmanager
    def on_device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    properties = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 * 1024,
        shared_memory_per_block_optin=SHARED_BYTES,
    )
    fake = FakeDriver()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: HOPPER)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    monkeypatch.setattr(kernel, "_driver", lambda: fake)
    monkeypatch.setattr(kernel, "compiled", lambda *_: b"image")
    kernel._function.cache_clear()
    kernel._multiprocessors.cache_clear()
    yield fake
    kernel._function.cache_clear()
    kernel._multiprocessors.cache_clear()


PLAIN = Kernel(Path("answer/gpu.cu"), "answer", (), threads=64)
SPREADING = Kernel(Path("answer/gpu.cu"), "answer", (), threads=64, spreads=True)


def launched(
    kernel: Kernel, *, blocks: int = 1, shared_bytes: int = 0, device: str = "cuda"
) -> None:
    launch(kernel, Call(1), blocks=blocks, shared_bytes=shared_bytes, device=torch.device(device))


def test_a_module_is_loaded_once_for_each_kernel_and_device(driver: FakeDriver) -> None:
    for blocks in range(1, 2000, 7):
        launched(SPREADING, blocks=blocks, shared_bytes=blocks)
    assert len(driver.arguments("cuModuleLoadData")) == 1
    launched(SPREADING, device="cuda:0")
    launched(SPREADING, device="cuda:1")
    assert len(driver.arguments("cuModuleLoadData")) == 2
    launched(PLAIN)
    assert len(driver.arguments("cuModuleLoadData")) == 3
    # A function has leave for whatever shared memory a launch may ask for.
    allowed = min(arguments[2].value for arguments in driver.arguments("cuFuncSetAttribute"))
    assert max(driver.launched(argument=7)) <= allowed == SHARED_BYTES


def test_a_launch_has_its_grid_and_torchs_stream(driver: FakeDriver) -> None:
    launched(PLAIN, blocks=5, shared_bytes=640)
    ((_, *words),) = driver.arguments("cuLaunchKernel")
    assert words[:8] == [5, 1, 1, 64, 1, 1, 640, 7]


@pytest.mark.parametrize(
    ("blocks", "shared_bytes"), [(1, SHARED_BYTES), (384, 75 * 1024), (100_000, 1000)]
)
def test_a_kernel_that_spreads_leaves_room_for_its_even_share_alone(
    blocks: int, shared_bytes: int, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(SPREADING, blocks=blocks, shared_bytes=1000)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    launched(SPREADING, blocks=blocks, shared_bytes=1000)
    assert driver.launched(argument=7) == [shared_bytes, 1000]


def test_a_thread_without_a_context_gets_one(driver: FakeDriver) -> None:
    launched(PLAIN)
    before = len(driver.arguments("cuCtxSetCurrent"))
    driver.statuses["cuLaunchKernel"] = [201]
    launched(PLAIN)
    assert len(driver.arguments("cuCtxSetCurrent")) == before + 1
    assert len(driver.arguments("cuLaunchKernel")) == 3


def test_a_launch_that_fails_is_named(driver: FakeDriver) -> None:
    driver.statuses["cuLaunchKernel"] = [701, 700]
    with pytest.raises(BackendError, match=r"launching answer with 3 blocks.*status 701\)"):
        launched(PLAIN, blocks=3)
    with pytest.raises(BackendError, match=r"status 700, of this or an earlier kernel\)"):
        launched(PLAIN, blocks=3)


def test_tensors_of_the_cpu_never_reach_the_driver(driver: FakeDriver) -> None:
    with pytest.raises(BackendError, match=r"tensors on cpu; move them to the GPU.*torch"):
        launched(PLAIN, device="cpu")
    assert not driver.calls
