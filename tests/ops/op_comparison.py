"""How the tests of ops compare a backend with the float64 reference, and documents with others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops.agreement import TOLERANCE, relative_error

LENGTHS = (1, 63, 64, 65, 200)

Arguments = dict[str, Any]
Op = Callable[..., Any]


def random_tensor(*shape: int, seed: int) -> Tensor:
    """float64 standard normal of its own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def document_ids(*rows: list[int]) -> Tensor:
    """(B, L) int32 from the document lengths of each row; ids return, as 0, 1, 0, 1, ..."""
    ids = [[number % 2 for number, n in enumerate(lengths) for _ in range(n)] for lengths in rows]
    return torch.tensor(ids, dtype=torch.int32)


def packed(length: int) -> Tensor:
    """(2, L) ids: a row of documents that end on chunk borders and off them, and one document."""
    if length == 1:
        return document_ids([1], [1])
    first = [n for n in (1, 40, 23, 1, 70) if n <= length // 5]
    return document_ids([*first, length - sum(first)], [length])


def leaves(arguments: Arguments, dtype: torch.dtype, low_precision: set[str]) -> Arguments:
    """Fresh leaf tensors in `dtype`; under bf16 only the names in `low_precision` are bf16."""

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        own = torch.float32 if dtype == torch.bfloat16 and name not in low_precision else dtype
        return value.detach().to(own, copy=True).requires_grad_()

    return {name: leaf(name, value) for name, value in arguments.items()}


def run(op: Op, arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    """Outputs `y`, `final_state` and every gradient `d name`, for fixed random output gradients."""
    y, state = op(**arguments, return_final_state=True, **options)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    gradients = torch.autograd.grad(
        [y, state],
        [arguments[name] for name in names],
        output_gradients(y, state),
    )
    results = {f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return {"y": y.detach(), "final_state": state.detach()} | results


def output_gradients(y: Tensor, state: Tensor) -> list[Tensor]:
    """Fixed random gradients of both outputs, the same numbers in every dtype."""
    return [
        random_tensor(*output.shape, seed=90 + i).bfloat16().to(output)
        for i, output in enumerate((y, state))
    ]


def assert_agrees(
    op: Op,
    arguments: Arguments,
    dtype: torch.dtype,
    low_precision: set[str],
    *,
    backend: str = "torch",
    **options: Any,
) -> None:
    """The backend in `dtype` equals the float64 reference on the same rounded inputs."""
    inputs = leaves(arguments, dtype, low_precision)
    exact = leaves(inputs, torch.float64, low_precision)
    found = run(op, inputs, backend=backend, **options)
    truth = run(op, exact, backend="reference", **options)
    for name, value in truth.items():
        error = relative_error(found[name], value)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e} at {dtype}"
        if name.startswith("d "):
            assert found[name].dtype == inputs[name[2:]].dtype


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_no_leak(
    op: Op,
    arguments: Arguments,
    per_position: set[str],
    *,
    row: int,
    document: slice,
    value: float | None,
    backend: str = "torch",
) -> None:
    """Replacing one document changes no bit of other documents' outputs and input gradients.

    `value` fills the document's inputs; None puts other random values there.
    """
    changed = dict(arguments)
    for name in per_position:
        if changed.get(name) is not None:
            changed[name] = changed[name].clone()
            part = changed[name][row, document]
            part[:] = random_tensor(*part.shape, seed=77) if value is None else value
    before = run(op, leaves(arguments, torch.float32, set()), backend=backend)
    after = run(op, leaves(changed, torch.float32, set()), backend=backend)
    others = torch.ones(before["y"].shape[:2], dtype=torch.bool)
    others[row, document] = False
    for name in {"y"} | {f"d {name}" for name in per_position if changed.get(name) is not None}:
        assert torch.equal(before[name][others], after[name][others]), name
    assert not torch.equal(before["y"][~others], after["y"][~others])
    intact_rows = [r for r in range(others.shape[0]) if r != row]
    whole_rows = ["final_state"] + (["d initial_state"] if "d initial_state" in before else [])
    for name in whole_rows:
        assert torch.equal(before[name][intact_rows], after[name][intact_rows]), name
    if document.stop < others.shape[1]:
        assert torch.equal(before["final_state"][row], after["final_state"][row])
    if document.start > 0 and "d initial_state" in before:
        assert torch.equal(before["d initial_state"][row], after["d initial_state"][row])


def assert_checkpointing_changes_no_bit(
    op: Op, arguments: Arguments, *, reentrant: bool, **options: Any
) -> None:
    """Recomputing the op under `torch.utils.checkpoint` gives the same outputs and gradients."""
    plain = run(op, leaves(arguments, torch.float32, set()), **options)
    inputs = leaves(arguments, torch.float32, set())

    def recomputed(*values: Any) -> Any:
        return op(**dict(zip(inputs, values, strict=True)), return_final_state=True, **options)

    y, state = checkpoint(recomputed, *inputs.values(), use_reentrant=reentrant)
    # torch.autograd.grad refuses reentrant checkpoints; backward takes both kinds.
    torch.autograd.backward([y, state], output_gradients(y, state))
    found = {f"d {n}": v.grad for n, v in inputs.items() if isinstance(v, Tensor) and v.is_leaf}
    assert_identical(found | {"y": y, "final_state": state}, plain)


def assert_autocast_changes_no_bit(op: Op, arguments: Arguments, **options: Any) -> None:
    plain = run(op, leaves(arguments, torch.float32, set()), **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(op, leaves(arguments, torch.float32, set()), **options)
    assert_identical(found, plain)


def assert_strides_change_no_bit(
    op: Op, arguments: Arguments, per_position: set[str], **options: Any
) -> None:
    """Slices of wider tensors, as a projection's chunks are, give what contiguous inputs give."""
    inputs = leaves(arguments, torch.float32, set())
    strided = dict(inputs)
    for name in per_position:
        wide = torch.cat([inputs[name], inputs[name]], dim=-1).detach()
        strided[name] = wide[..., : inputs[name].shape[-1]].requires_grad_()
        assert not strided[name].is_contiguous()
    assert_identical(run(op, strided, **options), run(op, inputs, **options))


def assert_two_runs_are_identical(op: Op, arguments: Arguments, **options: Any) -> None:
    first, second = (run(op, leaves(arguments, torch.float32, set()), **options) for _ in range(2))
    assert_identical(first, second)


def assert_threads_change_no_bit(
    op: Op, arguments: Arguments, dtype: torch.dtype, low_precision: set[str], **options: Any
) -> None:
    """One, two and three threads give the same outputs and gradients."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(op, leaves(arguments, dtype, low_precision), **options))
    finally:
        torch.set_num_threads(before)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def assert_a_step_agrees(op: Op, arguments: Arguments, *, threads: int) -> None:
    """One step of decoding on so many threads equals the float64 reference."""
    inputs = leaves(arguments, torch.float32, set())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = op(**inputs, return_final_state=True, backend="cpu")
    finally:
        torch.set_num_threads(before)
    exact = leaves(inputs, torch.float64, set())
    truth = op(**exact, return_final_state=True, backend="reference")
    for ours, expected in zip(found, truth, strict=True):
        assert relative_error(ours, expected) < TOLERANCE[torch.float32]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which every uninitialised tensor is full of NaN, so that reading one shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def assert_poisoned_memory_changes_no_bit(op: Op, arguments: Arguments, **options: Any) -> None:
    plain = run(op, leaves(arguments, torch.float32, set()), **options)
    with poisoned_memory():
        found = run(op, leaves(arguments, torch.float32, set()), **options)
    assert_identical(found, plain)


def assert_inference_equals_training(op: Op, arguments: Arguments, **options: Any) -> None:
    inputs = leaves(arguments, torch.float32, set())
    with torch.no_grad():
        inferred = op(**inputs, **options)
    assert torch.equal(inferred, op(**inputs, **options))


def assert_finite_differences(op: Op, arguments: Arguments, *, fast: bool, **options: Any) -> None:
    """Gradients of the outputs and of the final state pass gradcheck in float64."""
    inputs = leaves(arguments, torch.float64, set())
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad]

    def function(*tensors: Tensor) -> Any:
        replaced = inputs | dict(zip(names, tensors, strict=True))
        return op(**replaced, return_final_state=True, **options)

    assert torch.autograd.gradcheck(function, tuple(inputs[n] for n in names), fast_mode=fast)


def assert_halves_chain(
    op: Op, arguments: Arguments, per_position: set[str], *, at: int, **options: Any
) -> None:
    """Two calls joined by the carried state equal one call, in outputs and all gradients."""
    whole = leaves(arguments, torch.float64, set())
    first = {n: v[:, :at] if n in per_position else v for n, v in whole.items()}
    second = {n: v[:, at:] if n in per_position else v for n, v in whole.items()}
    y_first, state = op(**first, return_final_state=True, **options)
    second["initial_state"] = state
    y_second, final = op(**second, return_final_state=True, **options)
    y, expected_final = op(**whole, return_final_state=True, **options)
    chained = torch.cat([y_first, y_second], dim=1)
    assert relative_error(chained, y) < 1e-12
    assert relative_error(final, expected_final) < 1e-12
    names = [n for n, v in whole.items() if isinstance(v, Tensor) and v.requires_grad]
    tensors = [whole[n] for n in names]
    through_state = torch.autograd.grad((chained**2).sum() + final.sum(), tensors)
    at_once = torch.autograd.grad((y**2).sum() + expected_final.sum(), tensors)
    for name, found, truth in zip(names, through_state, at_once, strict=True):
        assert relative_error(found, truth) < 1e-11, name


def assert_packed_equals_alone(
    op: Op, arguments: Arguments, per_position: set[str], lengths: list[int], **options: Any
) -> None:
    """One row of documents gives each document's own output; the final state is the last one's."""
    inputs = arguments | {"initial_state": None, "seq_idx": document_ids(lengths)}
    y, final = op(**inputs, return_final_state=True, **options)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = {n: v[:, part] if n in per_position else v for n, v in inputs.items()}
        y_alone, final_alone = op(**alone | {"seq_idx": None}, return_final_state=True, **options)
        assert relative_error(y[:, part], y_alone) < 1e-12
        start += length
    assert relative_error(final, final_alone) < 1e-12


class _LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@contextmanager
def largest_tensor() -> Iterator[_LargestTensor]:
    """Context whose value's `elements` is the size of the largest tensor made inside."""
    with _LargestTensor() as mode:
        yield mode


@contextmanager
def saved_bytes(sizes: list[int]) -> Iterator[None]:
    """Context that appends the bytes of each tensor saved for a backward to `sizes`."""

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
