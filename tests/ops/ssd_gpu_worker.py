"""Compares the SSD scan's Triton kernels with the reference, in Triton's interpreter on the CPU.

A process of its own: the interpreter has to be chosen, by TRITON_INTERPRET=1, before triton is
imported. Prints one line for each output that is off, and exits with 1 if there is any.
"""

import sys
from typing import Any

import torch
from op_comparison import leaves, output_gradients, packed, random_tensor
from triton.runtime import interpreter

from mamba_dist.ops.agreement import relative_error, tolerance
from mamba_dist.ops.ssd import gpu, reference

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "seq_idx", "initial_state")
PER_POSITION = {"x", "dt", "B", "C", "z"}
TILE = {"heads": 2, "headdim": 16, "d_state": 16}
# Length, documents, options, dtype and shape: one chunk and several, segments of chunks, blocks of
# P, sums over some of the heads only, and sizes that fill no tile.
CASES: tuple[tuple[int, bool, bool, torch.dtype, dict[str, int]], ...] = (
    (2, True, True, torch.float32, {}),
    (65, True, False, torch.float32, {"groups": 2}),
    (90, True, True, torch.float32, {"batch": 1, "chunk_size": 16}),
    (33, False, True, torch.float32, {"heads": 2, "headdim": 70, "d_state": 33}),
    (63, False, False, torch.bfloat16, TILE),
    (130, True, True, torch.bfloat16, TILE),
)


def make_interpreter_work() -> None:
    """Mends gaps of Triton 3.6's interpreter: loop bounds under numpy 2.4, and bf16 numbers.

    It asks numpy for the integer of a one-element array, multiplies the bits of bf16 numbers, and
    cuts off what bf16 does not hold, where a GPU rounds.
    """
    builder_type, bf16 = interpreter.InterpreterBuilder, interpreter.tl.bfloat16
    patch_tensor = interpreter._patch_lang_tensor
    multiply, cast = builder_type.create_dot, builder_type.cast_impl

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widen(builder: Any, handle: Any) -> Any:
        if handle.dtype.scalar != bf16:
            return handle
        wide = interpreter.tl.block_type(interpreter.tl.float32, list(handle.data.shape))
        return builder.cast_impl(handle, wide)

    def dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        return multiply(builder, widen(builder, a), widen(builder, b), *others)

    def rounding_cast(builder: Any, source: Any, wanted: Any) -> Any:
        if source.dtype.scalar == interpreter.tl.float32 and wanted.scalar == bf16:
            values = torch.from_numpy(source.data.copy()).bfloat16()
            bits = values.view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, bf16)
        return cast(builder, source, wanted)

    interpreter._patch_lang_tensor = patch
    builder_type.create_dot, builder_type.cast_impl = dot, rounding_cast


def case_arguments(
    length: int,
    with_documents: bool,
    with_options: bool,
    *,
    batch: int = 2,
    heads: int = 4,
    headdim: int = 3,
    d_state: int = 5,
    groups: int = 1,
) -> dict[str, Any]:
    arguments = {
        "x": random_tensor(batch, length, heads, headdim, seed=1),
        "dt": random_tensor(batch, length, heads, seed=2),
        "A": -torch.exp(random_tensor(heads, seed=3)),
        "B": random_tensor(batch, length, groups, d_state, seed=4),
        "C": random_tensor(batch, length, groups, d_state, seed=5),
    }
    if with_documents:
        arguments["seq_idx"] = packed(length)[:batch]
    if not with_options:
        return arguments | {"dt": arguments["dt"].abs()}
    return arguments | {
        "D": random_tensor(heads, seed=6),
        "z": random_tensor(batch, length, heads, headdim, seed=7),
        "dt_bias": random_tensor(heads, seed=8) - 2,
        "initial_state": random_tensor(batch, heads, headdim, d_state, seed=9),
    }


def results(function: Any, arguments: dict[str, Any], chunk_size: int) -> dict[str, torch.Tensor]:
    values = {name: arguments.get(name) for name in NAMES}
    softplus = values["dt_bias"] is not None
    ordered = [values[name] for name in NAMES]
    y, state = function(*ordered[:8], softplus, *ordered[8:], chunk_size)
    names = [n for n, v in arguments.items() if v.is_floating_point()]
    gradients = torch.autograd.grad(
        [y, state], [arguments[n] for n in names], output_gradients(y, state)
    )
    return {"y": y, "final_state": state} | {
        f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def strided(arguments: dict[str, Any]) -> dict[str, Any]:
    """x, B and C as views of one tensor, as the model's convolution leaves them."""
    x, B, C = (arguments[name].detach() for name in ("x", "B", "C"))
    joined = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], dim=-1)
    parts = joined.split([t[0, 0].numel() for t in (x, B, C)], dim=-1)
    views = {
        name: part.view(whole.shape).requires_grad_()
        for name, part, whole in zip(("x", "B", "C"), parts, (x, B, C), strict=True)
    }
    return arguments | views


def main() -> int:
    make_interpreter_work()
    failures = 0
    for length, documents, options, dtype, shape in CASES:
        sizes = dict(shape)
        chunk_size = sizes.pop("chunk_size", 256)
        arguments = case_arguments(length, documents, options, **sizes)
        inputs = leaves(arguments, dtype, PER_POSITION)
        truth = results(reference.ssd, leaves(inputs, torch.float64, set()), chunk_size)
        found = results(gpu.ssd, strided(inputs), chunk_size)
        for name, value in truth.items():
            error = relative_error(found[name], value)
            if not error <= tolerance(dtype):
                failures += 1
                print(f"{name}: {error:.1e} at {dtype} of L {length}, {options=}, {shape}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
