"""The native kernels neither read nor write outside their tensors, and do nothing undefined."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sanitizer_worker.py")


def run_sanitized(*arguments: str, instruction_set: str = "") -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the sanitized kernels with")
    # Without libstdc++ beside it the sanitizer cannot follow the first exception that torch throws.
    runtime, standard_library = (
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no address sanitizer here")
    # Python itself leaks at exit, and torch's libraries know no sanitizer.
    environment = {
        "LD_PRELOAD": f"{runtime} {standard_library}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PATH": str(Path(compiler).parent),
        "HOME": str(Path.home()),
        **({"ATEN_CPU_CAPABILITY": instruction_set} if instruction_set else {}),
    }
    return subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "instruction_set", ["", "avx2", "default"], ids=lambda name: name or "widest"
)
def test_the_kernels_stay_inside_their_tensors(instruction_set: str) -> None:
    done = run_sanitized(instruction_set=instruction_set)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.slow
def test_the_sanitizer_would_see_a_kernel_that_does_not(tmp_path: Path) -> None:
    source = tmp_path / "broken" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" float read_past_the_end(const float* p) { return p[1000]; }\n')
    done = run_sanitized(str(source))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
