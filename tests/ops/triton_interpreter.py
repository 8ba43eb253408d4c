"""What Triton's interpreter lacks for our kernels, and what makes it slow, in Triton 3.6 to 3.9."""

import dataclasses
from typing import Any

import torch
from triton.runtime import interpreter


def make_interpreter_work() -> None:
    """Mends gaps of the interpreter: loop bounds under numpy 2.4, and bf16.

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


def make_interpreter_fast() -> None:
    """Half of its time goes into patching Triton's language again at each call that a kernel makes.

    And into looking for integers that overflow, of which these sizes have none.
    """
    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: dict[Any, Any] = {}

    def launch_with_fresh_language(executor: Any, *args: Any, **options: Any) -> None:
        patched.clear()
        launch(executor, *args, **options)

    def patch_once(function: Any) -> Any:
        if function not in patched:
            patched[function] = patch_language(function)
        return patched[function]

    interpreter.GridExecutor.__call__ = launch_with_fresh_language
    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
