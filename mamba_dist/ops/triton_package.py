"""Triton, which torch brings along on Linux with CUDA only: imported when it is needed."""

import importlib
from typing import Any

from mamba_dist.errors import BackendError

USE_TORCH = "use engine.ops_backend: torch"


def import_triton_module(name: str = "triton") -> Any:
    """Triton itself, or the module `name` that is written in it.

    Raises:
        BackendError: importing failed, in whatever way.
    """
    try:
        return importlib.import_module(name)
    # A Triton built for another torch fails with almost any exception.
    except Exception as error:
        raise BackendError(
            f"ops backend 'gpu' cannot import triton ({type(error).__name__}: {error}); install "
            f"the triton that torch asks for, or {USE_TORCH}"
        ) from error
