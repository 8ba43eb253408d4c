"""Residual add and RMSNorm: every backend against float64, in outputs and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    TOLERANCE,
    assert_identical,
    poisoned_memory,
    random_tensor,
    relative_error,
)
from torch.utils.checkpoint import checkpoint

from mamba_dist.ops.rms_norm import add_rms_norm

Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
BACKENDS = ["reference", "torch", "cpu"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def made(*shape: int, dtype: torch.dtype = torch.float32, with_residual: bool = True) -> Inputs:
    """Leaves x in `dtype`, residual and weight in fp32 or fp64; the stream has a mean far off 0."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (random_tensor(*shape, seed=1) + 0.5).to(dtype).requires_grad_()
    residual = random_tensor(*shape, seed=2).to(wide).requires_grad_() if with_residual else None
    return x, residual, random_tensor(shape[-1], seed=3).to(wide).requires_grad_()


def outcome(inputs: Inputs, output_dtype: torch.dtype, **options: str) -> dict[str, torch.Tensor]:
    """Both outputs and all gradients for fixed gradients of both outputs."""
    outputs = add_rms_norm(*inputs, eps=1e-5, output_dtype=output_dtype, **options)
    return with_gradients(inputs, outputs)


def with_gradients(
    inputs: Inputs, outputs: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    # Rounded to bf16, so that they are the same numbers in every dtype.
    sent = [
        random_tensor(*output.shape, seed=9 + i).bfloat16().to(output.dtype)
        for i, output in enumerate(outputs)
    ]
    given = [tensor for tensor in inputs if tensor is not None]
    gradients = torch.autograd.grad(outputs, given, sent)
    names = ["d x", "d weight"] if inputs[1] is None else ["d x", "d residual", "d weight"]
    found = {"normed": outputs[0].detach(), "stream": outputs[1].detach()}
    return found | dict(zip(names, gradients, strict=True))


def assert_close(inputs: Inputs, output_dtype: torch.dtype, backend: str) -> None:
    exact = tuple(None if t is None else t.detach().double().requires_grad_() for t in inputs)
    found = outcome(inputs, output_dtype, backend=backend)
    truth = outcome(exact, torch.float64, backend="reference")  # type: ignore[arg-type]
    dtypes = {inputs[0].dtype, output_dtype}
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for name, value in truth.items():
        assert relative_error(found[name], value) <= tolerance, name
    assert found["normed"].dtype == output_dtype
    assert found["stream"].dtype == inputs[2].dtype
    assert found["d x"].dtype == inputs[0].dtype


@backends
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 33, 40), (600, 64)])
def test_outputs_and_all_gradients_equal_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    with_residual: bool,
    backend: str,
) -> None:
    assert_close(made(*shape, dtype=dtype, with_residual=with_residual), output_dtype, backend)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    width=st.integers(2, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    with_residual=st.booleans(),
)
def test_any_shape_of_the_native_kernels_equals_float64(
    rows: int, width: int, dtype: torch.dtype, with_residual: bool
) -> None:
    assert_close(made(rows, width, dtype=dtype, with_residual=with_residual), dtype, "cpu")


@backends
def test_gradients_equal_finite_differences(backend: str) -> None:
    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(*tensors, eps=1e-5, output_dtype=torch.float64, backend=backend)

    assert torch.autograd.gradcheck(function, made(3, 5, dtype=torch.float64))


@backends
@pytest.mark.parametrize("pick", [0, 1])
def test_one_output_without_a_gradient_is_fine(pick: int, backend: str) -> None:
    gradients = []
    for name in (backend, "reference"):
        inputs = made(4, 24)
        outputs = add_rms_norm(*inputs, eps=1e-5, output_dtype=torch.float32, backend=name)
        gradients.append(torch.autograd.grad((outputs[pick] ** 2).sum(), inputs[0])[0])
    assert relative_error(*gradients) < TOLERANCE[torch.float32]


@backends
def test_half_precision_is_computed_in_fp32(backend: str) -> None:
    x, residual, weight = made(4, 24, dtype=torch.float16)
    half = add_rms_norm(x, residual, weight, eps=1e-5, output_dtype=torch.float16, backend=backend)
    full = add_rms_norm(
        x.float(), residual, weight, eps=1e-5, output_dtype=torch.float32, backend=backend
    )
    assert half[0].dtype == torch.float16
    assert torch.equal(half[0], full[0].half())
    assert torch.equal(half[1], full[1])


@backends
def test_autocast_changes_no_bit(backend: str) -> None:
    inputs = made(9, 24, dtype=torch.bfloat16)
    plain = outcome(inputs, torch.bfloat16, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(inputs, torch.bfloat16, backend=backend)
    assert_identical(found, plain)


@backends
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, backend: str) -> None:
    def norm(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(*tensors, eps=1e-5, output_dtype=torch.float32, backend=backend)

    inputs, again = made(9, 24), made(9, 24)
    gradients = []
    for tensors, function in ((inputs, norm), (again, None)):
        normed, stream = (
            function(*tensors) if function else checkpoint(norm, *tensors, use_reentrant=reentrant)
        )
        (normed * stream).sum().backward()
        gradients.append({str(i): t.grad for i, t in enumerate(tensors) if t is not None})
    assert_identical(gradients[1], gradients[0])


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(made(3000, 72), torch.bfloat16, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def test_the_native_kernels_write_every_output() -> None:
    plain = outcome(made(37, 23), torch.bfloat16, backend="cpu")
    with poisoned_memory():
        found = outcome(made(37, 23), torch.bfloat16, backend="cpu")
    assert_identical(found, plain)


def test_strided_inputs_give_the_same_bits() -> None:
    x, residual, weight = made(9, 24)
    assert residual is not None
    strided = [torch.cat([t, t], dim=-1).detach()[..., :24].requires_grad_() for t in (x, residual)]
    assert_identical(
        outcome((strided[0], strided[1], weight), torch.float32, backend="cpu"),
        outcome((x, residual, weight), torch.float32, backend="cpu"),
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_dispatchers_rules(dtype: torch.dtype, with_residual: bool) -> None:
    x, residual, weight = made(4, 24, dtype=dtype, with_residual=with_residual)
    operators = torch.ops.mamba_dist
    given = (x, residual, weight, 1e-5, torch.bfloat16)
    torch.library.opcheck(operators.add_rms_norm_cpu.default, given)
    sent = torch.ones(4, 24, dtype=torch.bfloat16)
    stream = None if residual is None else torch.ones(4, 24)
    given = (sent, stream, torch.ones(4, 24), weight.detach(), 1e-5, dtype)
    torch.library.opcheck(operators.add_rms_norm_cpu_backward.default, given)


def test_compiling_changes_no_bit_and_breaks_no_graph() -> None:
    def norm(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(*tensors, eps=1e-5, output_dtype=torch.bfloat16, backend="cpu")

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for with_residual in (False, True):
        inputs = made(9, 24, dtype=torch.bfloat16, with_residual=with_residual)
        assert_identical(
            with_gradients(inputs, compiled(*inputs)), with_gradients(inputs, norm(*inputs))
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.ones(2, 5)}, r"residual has shape \(2, 5\), expected \(2, 6\)"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(6,\)"),
        ({"output_dtype": torch.int32}, "output_dtype is torch.int32, expected a floating-point"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(2, 6), "residual": None, "weight": torch.ones(6)}
    options = {"eps": 1e-5, "output_dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments | options | changed)  # type: ignore[arg-type]
