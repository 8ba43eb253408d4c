"""SSD scan by our Triton kernels: in Triton's interpreter, and on a GPU where there is one."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import pytest
import torch
from op_comparison import (
    Arguments,
    assert_identical,
    document_ids,
    leaves,
    random_tensor,
    relative_error,
    run,
)
from processes import clean_environment

from mamba_dist.errors import BackendError
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.ssd import gpu, reference

WORKER = Path(__file__).with_name("ssd_gpu_worker.py")
PER_POSITION = {"x", "dt", "B", "C", "z"}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def scan(
    *,
    backend: str = "gpu",
    return_final_state: bool = True,
    chunk_size: int = 256,
    **arguments: Any,
) -> Any:
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    values = [arguments.get(name) for name in names[:-1]]
    rest = arguments.get("seq_idx"), arguments.get("initial_state"), chunk_size
    function = {"gpu": gpu.ssd, "reference": reference.ssd}[backend]
    return function(*values, arguments.get("dt_softplus", False), *rest)


def arguments_of(
    length: int, *, heads: int = 4, headdim: int = 16, d_state: int = 16, groups: int = 2
) -> Arguments:
    return {
        "x": random_tensor(2, length, heads, headdim, seed=1),
        "dt": random_tensor(2, length, heads, seed=2),
        "A": -torch.exp(random_tensor(heads, seed=3)),
        "B": random_tensor(2, length, groups, d_state, seed=4),
        "C": random_tensor(2, length, groups, d_state, seed=5),
        "D": random_tensor(heads, seed=6),
        "dt_bias": random_tensor(heads, seed=8) - 2,
        "dt_softplus": True,
        "initial_state": random_tensor(2, heads, headdim, d_state, seed=9),
    }


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Popen[str]]]:
    """Both of the worker's tasks at once, for each keeps one core busy for half a minute."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    started = {}
    for task, interpret in (("interpret", "1"), ("compile", "0")):
        environment = clean_environment() | {
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(task)),
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        }
        command = [sys.executable, "-W", "ignore", str(WORKER), task]
        started[task] = Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def test_outputs_and_gradients_equal_the_reference_in_tritons_interpreter(
    workers: dict[str, Popen[str]],
) -> None:
    said, _ = workers["interpret"].communicate()
    assert workers["interpret"].returncode == 0, said


def test_the_kernels_compile_for_a_gpu(workers: dict[str, Popen[str]]) -> None:
    said, _ = workers["compile"].communicate()
    assert workers["compile"].returncode == 0, said


def test_a_missing_triton_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launch", "forward", "backward"):
        monkeypatch.delitem(sys.modules, f"mamba_dist.ops.ssd.triton_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu.require_triton.cache_clear()
    with pytest.raises(
        BackendError, match=r"cannot import triton .*install the triton that torch asks for"
    ):
        scan(**leaves(arguments_of(4), torch.float32, set()))


def test_float64_inputs_are_refused() -> None:
    with pytest.raises(BackendError, match="no float64 kernel"):
        scan(**arguments_of(4))


@pytest.mark.parametrize(("length", "d_state"), [(1, 16), (5, 257)])
def test_one_step_and_a_state_too_wide_for_shared_memory_need_no_kernel(
    length: int, d_state: int
) -> None:
    inputs = leaves(arguments_of(length, d_state=d_state), torch.float32, set())
    truth = run(scan, leaves(inputs, torch.float64, set()), backend="reference")
    found = run(scan, inputs, backend="gpu")
    for name, value in truth.items():
        assert relative_error(found[name], value) < tolerance(torch.float32), name


def on_device(arguments: Arguments) -> Arguments:
    return {
        name: value.detach().cuda().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "shape"),
    [
        (2, {}),
        (65, {"headdim": 24, "d_state": 20}),
        (1000, {"headdim": 64, "d_state": 128, "groups": 1}),
        (300, {"headdim": 128, "d_state": 256, "groups": 1}),
    ],
)
def test_outputs_and_gradients_equal_the_reference_on_a_gpu(
    length: int, shape: dict[str, int], dtype: torch.dtype
) -> None:
    first = length // 3
    ids = document_ids([first, 1, length - first - 1], [length])
    arguments = arguments_of(length, **shape) | {"seq_idx": ids}
    inputs = leaves(arguments, dtype, PER_POSITION)
    truth = run(scan, leaves(inputs, torch.float64, set()), backend="reference")
    found = run(scan, on_device(inputs), backend="gpu")
    for name, value in truth.items():
        error = relative_error(found[name], value)
        assert error < tolerance(dtype, device_type="cuda"), f"{name}: {error:.1e}"


@pytest.mark.gpu
@on_gpu
def test_two_runs_on_a_gpu_are_identical() -> None:
    arguments = arguments_of(2048, heads=32, headdim=64, d_state=128, groups=1)
    first, second = (
        run(scan, on_device(leaves(arguments, torch.bfloat16, PER_POSITION))) for _ in range(2)
    )
    assert_identical(first, second)


@pytest.mark.gpu
@on_gpu
def test_documents_on_a_gpu_do_not_change_what_follows_them() -> None:
    arguments = arguments_of(300) | {"seq_idx": document_ids([100, 200], [300])}
    changed = dict(arguments)
    for name in ("x", "dt", "B", "C"):
        changed[name] = arguments[name].clone()
        changed[name][0, :100] = 3.0
    before, after = (
        run(scan, on_device(leaves(inputs, torch.float32, set())))
        for inputs in (arguments, changed)
    )
    for name in ("y", "d x", "d dt", "d B", "d C"):
        assert torch.equal(before[name][0, 100:], after[name][0, 100:]), name
    assert not torch.equal(before["y"][0, :100], after["y"][0, :100])
