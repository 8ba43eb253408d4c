"""Compares the SSD scan's Triton kernels with the reference, in Triton's interpreter on the CPU.

A process of its own: the interpreter has to be chosen, by TRITON_INTERPRET=1, before triton is
imported. Prints one line for each output that is off, and exits with 1 if there is any.

That is with the argument "interpret". With "compile" it compiles them for GPUs of compute
capability 8.9 and 9.0 instead, which takes no GPU and must be without TRITON_INTERPRET: the
interpreter takes what the compiler refuses.
"""

import sys
from typing import Any, NamedTuple

import torch
from mixer_gradients import emulated, gradients, placements, plain
from op_comparison import leaves, output_gradients, packed, random_tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_interpreter import make_interpreter_fast, make_interpreter_work

from mamba_dist.ops.agreement import relative_error, tolerance
from mamba_dist.ops.ssd import gpu, reference, triton_backward, triton_forward

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "seq_idx", "initial_state")
PER_POSITION = {"x", "dt", "B", "C", "z"}
KERNELS = (
    *("prepare_steps", "scan_chunks", "carry_states", "pass_states"),
    *("score_gradients", "state_gradients", "finish_steps"),
)
TILE = {"heads": 2, "headdim": 16, "d_state": 16}
# Length, documents, options, dtype and shape: one chunk and several, segments of chunks, blocks of
# P, sums over some of the heads only, and sizes that fill no tile.
CASES: tuple[tuple[int, bool, bool, torch.dtype, dict[str, int]], ...] = (
    (2, True, True, torch.float32, {}),
    (65, True, False, torch.float32, {"groups": 2}),
    (90, True, True, torch.float32, {"batch": 1, "chunk_size": 16}),
    (33, False, True, torch.float32, {"heads": 2, "headdim": 70, "d_state": 33}),
    # More heads than a program prepares the steps of.
    (18, True, True, torch.float32, {"batch": 1, "heads": 34, "headdim": 2, "groups": 2}),
    (63, False, False, torch.bfloat16, TILE),
    (130, True, True, torch.bfloat16, TILE),
)


class Precise(NamedTuple):
    """A bf16 case in which roundings that the kernels do without gave errors of 5e-3 and above."""

    length: int
    documents: bool
    shape: dict[str, int]
    without: tuple[str, ...] = ()
    dt_shift: float = 0.0


PRECISE = (
    # y: a position's own score, rounded. d C: the gate's gradient and the states, rounded.
    Precise(63, False, {"headdim": 16, "d_state": 16, "groups": 2}),
    # d initial_state: the gate's gradient rounded twice.
    Precise(64, True, {"headdim": 16, "d_state": 16, "groups": 2}),
    # d x, gated: a position's own score, rounded, where little else is left after decay.
    Precise(
        *(64, False, {"batch": 1, "heads": 2, "headdim": 16, "d_state": 16}),
        dt_shift=3.0,
    ),
    # d A: the sum of states times their gradients, which cancels; slow decays.
    Precise(
        *(192, False, {"batch": 1, "heads": 3, "headdim": 32, "d_state": 64}),
        without=("z", "initial_state"),
        dt_shift=-3.0,
    ),
)
PRECISE_TOLERANCE = 5e-3


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


def results(
    function: Any, arguments: dict[str, Any], chunk_size: int = 256, *, gradient_scale: float = 1.0
) -> dict[str, torch.Tensor]:
    values = {name: arguments.get(name) for name in NAMES}
    softplus = values["dt_bias"] is not None
    ordered = [values[name] for name in NAMES]
    y, state = function(*ordered[:8], softplus, *ordered[8:], chunk_size)
    names = [n for n, v in arguments.items() if v.is_floating_point()]
    above = [gradient * gradient_scale for gradient in output_gradients(y, state)]
    gradients = torch.autograd.grad([y, state], [arguments[n] for n in names], above)
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


def check_cases() -> int:
    failures = 0
    for length, documents, options, dtype, shape in CASES:
        sizes = dict(shape)
        chunk_size = sizes.pop("chunk_size", 256)
        arguments = case_arguments(length, documents, options, **sizes)
        inputs = leaves(arguments, dtype, PER_POSITION)
        label = f"{dtype} of L {length}, {options=}, {shape}"
        failures += compare(inputs, tolerance(dtype), label, chunk_size)
    return failures


def check_precise_cases() -> int:
    failures = 0
    for case in PRECISE:
        arguments = case_arguments(case.length, case.documents, True, **case.shape)
        arguments["dt_bias"] += case.dt_shift
        arguments = {name: v for name, v in arguments.items() if name not in case.without}
        inputs = leaves(arguments, torch.bfloat16, PER_POSITION)
        failures += compare(inputs, PRECISE_TOLERANCE, str(case), 256)
    return failures


def compare(inputs: dict[str, Any], limit: float, label: str, chunk_size: int) -> int:
    """Outputs and gradients further than `limit` from the reference's, after printing each."""
    truth = results(reference.ssd, leaves(inputs, torch.float64, set()), chunk_size)
    found = results(gpu.ssd, strided(inputs), chunk_size)
    errors = {name: relative_error(found[name], value) for name, value in truth.items()}
    off = {name: error for name, error in errors.items() if not error <= limit}
    for name, error in off.items():
        print(f"{name}: {error:.1e} at {label}")
    return len(off)


def check_ranges() -> int:
    """Gradients far below fp16's range keep all their digits, and what is infinite shows."""
    arguments = case_arguments(70, False, True, batch=1, **TILE)
    inputs = leaves(arguments, torch.bfloat16, PER_POSITION)
    plain = results(gpu.ssd, inputs)
    tiny = results(gpu.ssd, inputs, gradient_scale=2.0**-60)
    off = [n for n in plain if n[:2] == "d " and not torch.equal(tiny[n], plain[n] * 2.0**-60)]
    with torch.no_grad():
        inputs["x"][0, 40, 0, 3] = torch.inf
    infinite = results(gpu.ssd, inputs)
    off += [name for name in ("d dt", "d B", "d C") if infinite[name].isfinite().all()]
    for name in off:
        print(f"{name}: lost in the range of fp16")
    failures = len(off)
    for name, scale in (("x", 1e33), ("x", 1e-30), ("B", 1e15)):
        inputs = leaves(arguments, torch.bfloat16, PER_POSITION)
        with torch.no_grad():
            inputs[name] *= scale
        failures += compare(inputs, tolerance(torch.bfloat16), f"{name} times {scale}", 256)
    return failures


def check_sizes_that_change() -> int:
    """A chunk of other sizes, of the same segment, leaves small values their digits."""
    failures = 0
    # What is loud, where and how much (all else is 2^-70), how fast all decays, whether a document
    # ends behind it, and where nothing is left of it: later for states, earlier for gradients.
    for name, loud, factor, decay, ends, checked in (
        ("x", slice(0, 64), 2.0**-30, -3.0, False, slice(192, 256)),
        ("C", slice(384, 400), 2.0**-30, -3.0, False, slice(256, 320)),
        ("x", slice(0, 64), 2.0**70, -0.3, True, slice(192, 256)),
    ):
        arguments = case_arguments(400, False, False, batch=1, **TILE)
        arguments["A"] = torch.full_like(arguments["A"], decay).requires_grad_()
        if ends:
            arguments["seq_idx"] = (torch.arange(400) >= loud.stop).int()[None]
        inputs = leaves(arguments, torch.bfloat16, PER_POSITION)
        with torch.no_grad():
            kept = inputs[name][:, loud] * factor
            inputs[name] *= 2.0**-70
            inputs[name][:, loud] = kept
        truth = results(reference.ssd, leaves(inputs, torch.float64, set()))
        found = results(gpu.ssd, strided(inputs))
        for output in ("d x", "d dt", "d B", "d C"):
            error = relative_error(found[output][:, checked], truth[output][:, checked])
            if not error <= tolerance(torch.bfloat16):
                print(f"{output} at {checked}: {error:.1e}, {name} times {factor} at {loud}")
                failures += 1
    return failures


def check_sums_over_heads() -> int:
    """d B and d C of many heads have the rounding of what comes out, and no other, 1.65e-3."""
    arguments = case_arguments(64, False, True, batch=1, **TILE | {"heads": 16})
    arguments["dt_bias"] -= 3.0
    inputs = leaves(
        {n: v for n, v in arguments.items() if n not in ("z", "initial_state")},
        torch.bfloat16,
        PER_POSITION,
    )
    truth = results(reference.ssd, leaves(inputs, torch.float64, set()))
    found = results(gpu.ssd, inputs)
    failures = 0
    for name in ("d B", "d C"):
        deviation = (found[name].double() - truth[name]).norm() / truth[name].norm()
        if not deviation <= 1.8e-3:
            print(f"{name} of 16 heads: ||deviation|| is {deviation:.2e} of the truth's")
            failures += 1
    return failures


def check_rows() -> int:
    """What a row makes of an infinity or an outlier is nothing to the others."""
    arguments = case_arguments(70, False, True, batch=2, **TILE)
    inputs = leaves(arguments, torch.bfloat16, PER_POSITION)
    clean = results(gpu.ssd, inputs)
    failures = 0
    for name, value in (("B", torch.inf), ("C", 1e9), ("x", torch.nan)):
        spoilt = leaves(arguments, torch.bfloat16, PER_POSITION)
        with torch.no_grad():
            spoilt[name][1, 5, 0, 3] = value
        found = results(gpu.ssd, spoilt)
        for output in ("y", "d x", "d dt", "d B", "d C", "d z"):
            if not torch.equal(found[output][0], clean[output][0]):
                print(f"{output} of row 0 depends on {name} {value} in row 1")
                failures += 1
    return failures


def check_mixer() -> int:
    """Gradients of Mamba-2's mixer are the same bits side by side, where the kernels wrote them."""
    failures = 0
    with emulated():
        for checkpointing, autocast in (("none", False), ("selective", True), ("full", False)):
            options: dict[str, Any] = {"checkpointing": checkpointing, "autocast": autocast}
            with placements() as in_place:
                found, operators = gradients("mamba2", **options)
            with plain():
                expected, plain_operators = gradients("mamba2", **options)
            off = [name for name in expected if not torch.equal(found[name], expected[name])]
            # z, xBC and dt; x, B and C.
            moved = in_place != [True] * 6 or "cat" in operators or "cat" not in plain_operators
            if off or moved:
                print(f"mixer with {options}: {off} differ, {in_place=}, {operators}")
                failures += 1
    return failures


class _NoGpu:
    """A driver that knows what to compile for, and has no device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A kernel whose launch compiles it only, and notes the shared memory of a block."""

    def __init__(self, name: str, kernel: Any, shared_bytes: dict[str, int]) -> None:
        self.name, self.kernel, self.shared_bytes = name, kernel, shared_bytes

    def __getitem__(self, grid: Any) -> Any:
        def compile(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            needed = max(self.shared_bytes.get(self.name, 0), compiled.metadata.shared)
            self.shared_bytes[self.name] = needed

        return compile


def compile_all() -> int:
    """Compiles what gated scans of several segments take; how many do not fit into a block."""
    shared_bytes: dict[str, int] = {}
    for module in (triton_forward, triton_backward):
        for name, kernel in vars(module).copy().items():
            if name in KERNELS:
                setattr(module, name, _Compiled(name, kernel, shared_bytes))
    failures = 0
    # Hopper has instructions of its own; Ada has the least shared memory (CUDA C++ Programming
    # Guide, table of technical specifications).
    for capability, most, dtype, d_state in (
        (90, 227 * 1024, torch.bfloat16, 128),
        (89, 99 * 1024, torch.bfloat16, 256),
        (89, 99 * 1024, torch.float32, 256),
    ):
        driver.set_active(_NoGpu(capability))
        shared_bytes.clear()
        arguments = case_arguments(700, True, True, batch=1, heads=1, headdim=64, d_state=d_state)
        results(gpu.ssd, leaves(arguments, dtype, PER_POSITION))
        assert shared_bytes.keys() == set(KERNELS)
        for name, needed in shared_bytes.items():
            if needed > most:
                print(
                    f"{name}: {needed} bytes of shared memory, {dtype}, {d_state=}, {capability=}"
                )
                failures += 1
    return min(1, failures)


def main() -> int:
    if sys.argv[1] == "compile":
        return compile_all()
    make_interpreter_work()
    make_interpreter_fast()
    checks = (
        *(check_cases, check_precise_cases, check_ranges),
        *(check_sizes_that_change, check_sums_over_heads, check_rows, check_mixer),
    )
    return min(1, sum(check() for check in checks))


if __name__ == "__main__":
    sys.exit(main())
