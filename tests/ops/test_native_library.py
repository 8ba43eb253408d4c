"""Compiling and loading native kernels, and the vector functions that they are made of."""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import clean_environment
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.native import library
from mamba_dist.ops.native.library import InstructionSet, cache_folder, load_kernel

PROBE = Path(__file__).with_name("simd_probe.cpp")
WIDEST_FIRST: tuple[InstructionSet, ...] = ("avx512", "avx2", "portable")
EXTREMES = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0]

# name -> its number in the probe, the truth in float64, the range of x, largest relative error in
# fp32. Beyond |x| = 1 a relative error of x itself, half an ulp, passes through exp.
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor], tuple[float, float], float]] = {
    "exp2": (0, torch.exp2, (-126, 127), 4e-7),
    "exp2_bounded": (1, torch.exp2, (-126, 126), 4e-7),
    "exp": (2, torch.exp, (-87, 88), 6e-6),
    "sigmoid": (3, torch.sigmoid, (-87, 100), 6e-6),
    "softplus": (4, lambda x: torch.logaddexp(x, torch.zeros_like(x)), (-87, 100), 6e-6),
    "softplus_and": (5, lambda x: torch.logaddexp(x, torch.zeros_like(x)), (-87, 100), 6e-6),
    "and_slope": (6, torch.sigmoid, (-87, 100), 6e-6),
    "log1p_of_unit": (7, torch.log1p, (0, 1), 4e-7),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernels' folder for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tmp_path in cache_folder().parents
    return cache_folder()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A kernel of one function, which gives 1; its header says so."""
    folder = tmp_path / "answer"
    folder.mkdir()
    (folder / "number.h").write_text("constexpr int NUMBER = 1;\n")
    code = '#include "number.h"\nextern "C" int answer() { return NUMBER; }\n'
    (folder / "cpu.cpp").write_text(code)
    return folder / "cpu.cpp"


@pytest.fixture(params=WIDEST_FIRST)
def probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The probe compiled for one instruction set; skips those that the machine lacks."""
    if WIDEST_FIRST.index(request.param) < WIDEST_FIRST.index(library.instruction_set()):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "instruction_set", lambda: request.param)
    return load_kernel.__wrapped__(PROBE)


def apply(probe: ctypes.CDLL, function: int, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    kernel = getattr(probe, f"apply_{str(x.dtype).removeprefix('torch.')}")
    kernel(
        ctypes.c_int64(function),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int64(x.numel()),
    )
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_near_its_truth(probe: ctypes.CDLL, name: str) -> None:
    function, truth, (low, high), tolerance = FUNCTIONS[name]
    for dtype, limit in ((torch.float32, tolerance), (torch.float64, 1e-14)):
        # 10,007 is no multiple of a vector.
        x = torch.cat([torch.linspace(low, high, 10007), torch.linspace(low, high, 999) / 300])
        x = x.to(dtype)
        expected = truth(x.double())
        scale = expected.where(expected != 0, 1)
        error = ((apply(probe, function, x) - expected) / scale).abs().max()
        assert error < limit, f"{error:.1e} in {dtype}"


@pytest.mark.parametrize("name", ["exp2", "exp", "sigmoid", "softplus", "softplus_and"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_of_extremes_is_its_limit(
    probe: ctypes.CDLL, name: str, dtype: torch.dtype
) -> None:
    function, truth, _, _ = FUNCTIONS[name]
    x = torch.tensor(EXTREMES, dtype=dtype)
    found, expected = apply(probe, function, x), truth(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    finite = expected.isfinite()
    # Below the normal range the functions may stop at 2^-126.
    assert torch.allclose(found[finite], expected[finite], rtol=1e-6, atol=2**-125)


def test_exp2_is_unbiased_near_zero(probe: ctypes.CDLL) -> None:
    """A slow decay is a power of thousands of steps, where a bias of 1e-7 grows to 1e-4."""
    for bound in (0.02, 0.1):
        x = torch.linspace(bound / 10, bound, 9999)
        error = apply(probe, 0, x).double() / torch.exp2(x.double()) - 1
        assert (error / x).mean().abs() < 2e-7


def test_a_nan_keeps_any_payload(probe: ctypes.CDLL) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F8001FF, -1, 0x7FFFFFFF], dtype=torch.int32)
    for function in (0, 2, 3, 4, 5, 8, 9):
        assert apply(probe, function, bits.view(torch.float32)).isnan().all(), function


def test_bounds_are_those_of_clamp(probe: ctypes.CDLL) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([*EXTREMES, 0.5, 1.0, 1.5], dtype=dtype)
        for function, expected in ((8, x.clamp(min=1)), (9, x.clamp(max=1))):
            found = apply(probe, function, x)
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lane_sums_keep_the_vectors_order(probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    x, y = torch.arange(256, dtype=dtype) ** 2, torch.zeros(16, dtype=dtype)
    kernel = getattr(probe, f"lane_sums_{str(dtype).removeprefix('torch.')}")
    kernel.restype = ctypes.c_int64
    lanes = kernel(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert torch.equal(y[:lanes], x[: lanes * lanes].view(lanes, lanes).sum(1))


def test_bf16_is_rounded_as_torch_rounds_it(probe: ctypes.CDLL) -> None:
    spread = torch.randn(10007, generator=torch.Generator().manual_seed(0)) * 20
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000], dtype=torch.int32)
    x = torch.cat([spread.exp() * spread.sign(), ties.view(torch.float32), torch.tensor(EXTREMES)])
    halves = [torch.empty(len(x), dtype=torch.bfloat16) for _ in range(2)]
    wide = [torch.empty(len(x)) for _ in range(2)]
    count = ctypes.c_int64(len(x))
    probe.to_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (x, *halves)), count)
    probe.from_bf16(*(ctypes.c_void_p(t.data_ptr()) for t in (halves[0], *wide)), count)
    expected = x.bfloat16()
    for found in (*halves, *wide):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.float().nan_to_num(7.0), expected.float().nan_to_num(7.0))


def test_a_changed_header_is_compiled_again(cache: Path, source: Path) -> None:
    assert load_kernel.__wrapped__(source).answer() == 1
    (source.parent / "number.h").write_text("constexpr int NUMBER = 2;\n")
    assert load_kernel.__wrapped__(source).answer() == 2
    assert len(list(cache.glob("*.so"))) == 2


def test_a_compiled_kernel_needs_no_compiler(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_kernel.__wrapped__(source)
    monkeypatch.setenv("PATH", "")
    assert load_kernel.__wrapped__(source).answer() == 1


def test_a_run_says_that_it_compiles_the_first_time(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "mamba_dist"):
        library.build_kernels([source])
        assert "compiling" in caplog.text
        assert "answer" in caplog.text
        caplog.clear()
        load_kernel.cache_clear()
        library.build_kernels([source])
    assert not caplog.text


def test_without_a_compiler_the_message_says_what_to_install(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler.*apt install g\+\+.*: torch"):
        load_kernel.__wrapped__(source)


def test_a_compile_error_is_shown_and_leaves_nothing_behind(cache: Path, source: Path) -> None:
    source.write_text("this is no C++\n")
    with pytest.raises(BackendError, match=r"could not compile cpu.cpp of answer[\s\S]*error"):
        load_kernel.__wrapped__(source)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file where a folder belongs: root may write into any folder.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"kernels cannot be used .*make it writable"):
        load_kernel.__wrapped__(source)


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def lose_a_page(whole: bytes) -> bytes:
    return whole[:4096] + bytes(4096) + whole[8192:]


@pytest.mark.parametrize("damage", [cut, lose_a_page, lambda whole: b""])
def test_a_damaged_library_is_built_again(
    cache: Path, source: Path, damage: Callable[[bytes], bytes]
) -> None:
    load_kernel.__wrapped__(source)
    (built,) = cache.glob("*.so")
    whole = built.read_bytes()
    built.unlink()  # the library is mapped: a change in place would be felt by this process
    built.write_bytes(damage(whole))
    assert load_kernel.__wrapped__(source).answer() == 1
    assert built.read_bytes()[:4096] == whole[:4096]


def test_what_a_killed_build_left_is_swept_up(cache: Path, source: Path) -> None:
    load_kernel.__wrapped__(source)
    (built,) = cache.glob("*.so")
    left = cache / f".building-{built.stem}-killed"
    left.mkdir()
    (left / "cpu.o").touch()
    built.unlink()
    load_kernel.__wrapped__(source)
    assert not left.exists()


def test_a_build_killed_in_the_middle_holds_up_nobody_after_it(
    cache: Path, source: Path, tmp_path: Path
) -> None:
    """The compiler outlives the kill, and the lock must not."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho $$ > $0.pid\nexec sleep 60\n")
    compiler.chmod(0o755)
    code = (
        "import pathlib, sys\n"
        "from mamba_dist.ops.native.library import load_kernel\n"
        "load_kernel(pathlib.Path(sys.argv[1]))\n"
    )
    environment = {
        **clean_environment(),
        "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
    }
    building = subprocess.Popen([sys.executable, "-c", code, str(source)], env=environment)
    pid = compiler.with_suffix(".pid")
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert list(cache.glob(".building-*"))
        building.kill()
        building.wait()
        began = time.monotonic()
        assert load_kernel.__wrapped__(source).answer() == 1
        assert time.monotonic() - began < 30
        assert not list(cache.glob(".building-*"))
    finally:
        building.kill()
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_file_system_without_locks_will_do(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(library.fcntl, "flock", no_locks)
    assert load_kernel.__wrapped__(source).answer() == 1


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("#!/nowhere/sh\n", "No such file"),
        ("#!/bin/sh\nexit 0\n", "it wrote nothing"),
        ("#!/bin/sh\nexit 3\n", "exit 3"),
    ],
)
def test_a_compiler_that_does_not_work_is_blamed_by_name(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    compiler = source.parent / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(
        BackendError, match=rf"{re.escape(str(compiler))} could not compile[\s\S]*{complaint}"
    ):
        load_kernel.__wrapped__(source)


def test_without_a_home_the_message_names_what_to_set(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(_: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(library.platformdirs, "user_cache_path", no_home)
    with pytest.raises(BackendError, match="set HOME or XDG_CACHE_HOME"):
        load_kernel.__wrapped__(source)


def test_processes_that_build_at_once_all_succeed(cache: Path, source: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from mamba_dist.ops.native.library import load_kernel\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(load_kernel(pathlib.Path(sys.argv[1])).answer())\n"
    )
    environment = {**clean_environment(), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    # Both wait here, so that the builds begin together.
    results = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, error = process.communicate(timeout=60)
        results.append((process.returncode, out.strip()))
        assert process.returncode == 0, error
    assert results == [(0, "1"), (0, "1")]
    assert len(list(cache.glob("*.so"))) == 1
