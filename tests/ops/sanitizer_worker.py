"""Runs the kernels, built with the address and undefined-behaviour sanitizers, on odd shapes.

Started by test_native_sanitizers.py with the sanitizers' runtime preloaded; a finding ends the
process with its report.
"""

import ctypes
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.native import library
from mamba_dist.ops.rms_norm import add_rms_norm
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
LENGTHS = (1, 2, 31, 65, 130)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(dtype).requires_grad_()


def documents(batch: int, length: int) -> Tensor:
    """A document of one position, one that ends off every border, and the rest."""
    ids = torch.zeros(batch, length, dtype=torch.int32)
    ids[0, 1:] = 1
    ids[-1, length // 2 :] += 1
    return ids


def backward(outputs: tuple[Tensor, Tensor] | Tensor) -> None:
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward([p.float().sum() for p in parts])


def run_scan(length: int, dtype: torch.dtype, options: bool) -> None:
    for channels, d_state, groups in ((1, 1, 1), (17, 16, 1), (48, 5, 3), (32, 16, 2), (16, 33, 1)):
        row = tensor(2, length, 2 * channels, dtype=dtype)
        u, z = row.chunk(2, dim=-1)
        B, C = (tensor(2, length, groups, d_state, dtype=dtype) for _ in range(2))
        delta, A = tensor(2, length, channels, dtype=dtype), -tensor(channels, d_state).exp()
        optional = (tensor(channels), z, tensor(channels), True, documents(2, length))
        state = (tensor(2, channels, d_state),)
        extra = (*optional, *state) if options else (None, None, None, False, None, None)
        backward(selective_scan(u, delta, A, B, C, *extra, options, backend="cpu"))
        with torch.no_grad():
            selective_scan(u, delta, A, B, C, *extra, options, backend="cpu")


def run_ssd(length: int, dtype: torch.dtype, options: bool) -> None:
    for heads, headdim, d_state, groups in ((1, 1, 1, 1), (4, 24, 20, 2), (2, 64, 128, 1)):
        inner, shared = heads * headdim, groups * d_state
        row = tensor(2, length, inner + 2 * shared, dtype=dtype)
        x, B, C = row.split((inner, shared, shared), dim=-1)
        arguments = (
            x.unflatten(-1, (heads, headdim)),
            tensor(2, length, heads, dtype=dtype),
            -tensor(heads).exp(),
            B.unflatten(-1, (groups, d_state)),
            C.unflatten(-1, (groups, d_state)),
        )
        z = tensor(2, length, heads, headdim, dtype=dtype)
        optional = (tensor(heads), z, tensor(heads), True, documents(2, length))
        state = (tensor(2, heads, headdim, d_state),)
        extra = (*optional, *state) if options else (None, None, None, False, None, None)
        backward(ssd(*arguments, *extra, options, backend="cpu"))
        with torch.no_grad():
            ssd(*arguments, *extra, options, backend="cpu")


def run_conv(length: int, dtype: torch.dtype, options: bool) -> None:
    for channels, width in ((1, 1), (17, 4), (48, 3), (33, 6)):
        x = tensor(2, length, 2 * channels, dtype=dtype)[..., :channels]
        extra = (None, None, None)
        if options:
            state = tensor(2, channels, width - 1)
            extra = (tensor(channels), documents(2, length), state)
        weight = tensor(channels, width)
        activation = "silu" if options else None
        backward(causal_conv1d(x, weight, *extra, options, activation, backend="cpu"))
        with torch.no_grad():
            causal_conv1d(x, weight, *extra, options, activation, backend="cpu")


def run_cross_entropy(length: int, dtype: torch.dtype, options: bool) -> None:
    rows = 40 if options else 1
    labels = torch.randint(0, rows, (2, length))
    labels[0, 0] = -100
    loss = linear_cross_entropy(
        tensor(2, length, 8, dtype=dtype),
        tensor(rows + 3, 8, dtype=dtype),
        labels,
        vocab_size=rows,
        backend="cpu",
    )
    backward(loss)


def run_rms_norm(length: int, dtype: torch.dtype, options: bool) -> None:
    for width in (1, 17, 48, 130):
        residual = tensor(2, length, width) if options else None
        x, weight = tensor(2, length, width, dtype=dtype), tensor(width)
        backward(add_rms_norm(x, residual, weight, eps=1e-5, output_dtype=dtype, backend="cpu"))


def read_past_the_end(source: Path) -> None:
    """What the sanitizers have to catch, to show that they are at work."""
    values = torch.zeros(1000)
    library.load_kernel(source).read_past_the_end(ctypes.c_void_p(values.data_ptr()))


def main() -> None:
    for flags in library._FLAGS:
        library._FLAGS[flags] += SANITIZERS
    if len(sys.argv) > 1:
        read_past_the_end(Path(sys.argv[1]))
    resolve_backend("cpu", device_type="cpu")
    dtypes = (torch.float32, torch.bfloat16)
    for length, dtype, options in itertools.product(LENGTHS, dtypes, (False, True)):
        for run in (run_scan, run_ssd, run_conv, run_cross_entropy, run_rms_norm):
            run(length, dtype, options)
    print("clean")


if __name__ == "__main__":
    main()
