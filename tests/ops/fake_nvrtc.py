"""A stand-in for NVRTC, which comes with CUDA builds of torch only."""

import ctypes
import hashlib
from typing import Any

import pytest

from mamba_dist.ops.nvrtc import compiler

IMAGE_BYTES = 1 << 20


class FakeNvrtc:
    """Makes an image of each source and its flags; none, but a log, if `error` is set."""

    def __init__(self) -> None:
        self.compilations = 0
        self.error = ""
        self._text, self._image = b"", b""

    def nvrtcVersion(self, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = 12, 9
        return 0

    def nvrtcCreateProgram(self, program: Any, text: bytes, *_: Any) -> int:  # noqa: N802
        program._obj.value, self._text = 1, text
        return 0

    def nvrtcCompileProgram(self, program: Any, count: int, flags: Any) -> int:  # noqa: N802
        self.compilations += 1
        made_of = hashlib.sha256(repr((self._text, list(flags))).encode()).digest()
        self._image = made_of * (IMAGE_BYTES // len(made_of))
        return 6 if self.error else 0

    def nvrtcGetCUBINSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = len(self._image)
        return 0

    def nvrtcGetCUBIN(self, program: Any, image: Any) -> int:  # noqa: N802
        ctypes.memmove(image, self._image, len(self._image))
        return 0

    def nvrtcGetProgramLogSize(self, program: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = len(self.error) + 1
        return 0

    def nvrtcGetProgramLog(self, program: Any, text: Any) -> int:  # noqa: N802
        text.value = self.error.encode()
        return 0

    def nvrtcDestroyProgram(self, program: Any) -> int:  # noqa: N802
        return 0


def install(monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    """Puts the stand-in where the library would be."""
    nvrtc = FakeNvrtc()
    monkeypatch.setattr(compiler, "_library", lambda: nvrtc)
    monkeypatch.setattr(compiler, "nvrtc_version", compiler.nvrtc_version.__wrapped__)
    return nvrtc
