"""The backends of each op on a GPU against the float64 reference on the CPU."""

import functools
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from op_comparison import (
    Arguments,
    Op,
    document_ids,
    leaves,
    random_tensor,
    relative_error,
    run,
)
from step_cases import OPTIONAL, STEPS, assert_step_agrees, without
from torch import Tensor

from mamba_dist.commands.bench.cases import Case
from mamba_dist.commands.doctor import compare_backends
from mamba_dist.ops.agreement import tolerance
from mamba_dist.ops.backend import Backend, BackendStatus, describe_backends
from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.cross_entropy import linear_cross_entropy
from mamba_dist.ops.linear import linear
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# The truth, and what never runs on a GPU.
NOT_ON_GPU = {"reference", "cpu"}
# Document lengths of two rows: on chunk borders and off them, of one position, and of a whole row.
DOCUMENTS = {
    1: ([1], [1]),
    63: ([1, 15, 47], [63]),
    64: ([16, 1, 47], [64]),
    65: ([64, 1], [1, 64]),
    200: ([63, 2, 1, 134], [200]),
    2048: ([1, 255, 256, 1, 1535], [2047, 1]),
}
PER_POSITION = {"u", "delta", "B", "C", "z", "x", "dt"}
OPS: dict[str, Op] = {"scan": selective_scan, "ssd": ssd, "conv": causal_conv1d}
# As far as a model goes without them; softplus stays, as steps below zero are another matter.
OPTIONS = {
    "scan": ("D", "z", "delta_bias", "initial_state"),
    "ssd": ("D", "z", "dt_bias", "initial_state"),
    "conv": ("bias", "activation", "initial_state"),
}
SHAPES_OF_MODELS = [
    Case("selective_scan", {"B": 2, "L": 520, "E": 1536, "N": 16}),
    Case("ssd", {"B": 2, "L": 520, "H": 24, "P": 64, "N": 128, "G": 1, "Q": 256}),
    Case("causal_conv1d", {"B": 2, "L": 520, "E": 1792, "K": 4}),
    Case("linear", {"B": 2, "L": 520, "I": 768, "O": 3352}),
    Case("add_rms_norm", {"B": 2, "L": 130, "D": 768}),
    Case("add_rms_norm", {"B": 1, "L": 65, "D": 2560}),
    Case("linear_cross_entropy", {"B": 2, "L": 65, "D": 768, "V": 5032}),
]
# Shapes of models, one text and many; and sizes that no kernel is made for.
STEP_CASES: dict[str, list[Arguments]] = {
    "scan": [
        *({"batch": batch, "channels": 4096} for batch in (1, 2, 17, 64)),
        *({"batch": 3, "channels": 77, "d_state": n} for n in (1, 5, 16, 128, 256)),
        {"batch": 64, "channels": 1536, "d_state": 20, "groups": 3},
    ],
    "ssd": [
        *({"batch": b, "heads": 64, "headdim": 64, "d_state": 128} for b in (1, 8, 64)),
        *({"heads": 5, "headdim": 7, "d_state": n, "groups": 1} for n in (1, 24, 64, 256, 260)),
        {"batch": 64, "heads": 24, "headdim": 64, "d_state": 128, "groups": 8},
    ],
    "conv": [
        *({"batch": batch, "channels": 4352} for batch in (1, 17, 64)),
        *({"batch": 33, "channels": 8193, "width": width} for width in (2, 3, 4)),
    ],
}

in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dataclass(frozen=True)
class Setting:
    """One way to call an op: `groups` of B and C, without the options named in `without`."""

    op: str
    length: int
    dtype: torch.dtype
    with_documents: bool = True
    groups: int = 2
    without: tuple[str, ...] = ()


@functools.cache
def statuses() -> dict[str, BackendStatus]:
    return {status.name: status for status in describe_backends("cuda")}


@pytest.fixture(params=[name for name in get_args(Backend) if name not in NOT_ON_GPU])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that works here."""
    status = statuses()[request.param]
    if not status.available:
        pytest.skip(status.detail)
    return status.name


def scan_arguments(setting: Setting) -> Arguments:
    length = setting.length
    return {
        "u": random_tensor(2, length, 32, seed=1),
        "delta": random_tensor(2, length, 32, seed=2),
        "A": -torch.exp(random_tensor(32, 16, seed=3)),
        "B": random_tensor(2, length, setting.groups, 16, seed=4),
        "C": random_tensor(2, length, setting.groups, 16, seed=5),
        "D": random_tensor(32, seed=6),
        "z": random_tensor(2, length, 32, seed=7),
        "delta_bias": random_tensor(32, seed=8) - 2,
        "delta_softplus": True,
        "initial_state": random_tensor(2, 32, 16, seed=9),
    }


def ssd_arguments(setting: Setting) -> Arguments:
    length = setting.length
    return {
        "x": random_tensor(2, length, 4, 16, seed=1),
        "dt": random_tensor(2, length, 4, seed=2),
        "A": -torch.exp(random_tensor(4, seed=3)),
        "B": random_tensor(2, length, setting.groups, 16, seed=4),
        "C": random_tensor(2, length, setting.groups, 16, seed=5),
        "D": random_tensor(4, seed=6),
        "z": random_tensor(2, length, 4, 16, seed=7),
        "dt_bias": random_tensor(4, seed=8) - 2,
        "dt_softplus": True,
        "initial_state": random_tensor(2, 4, 16, 16, seed=9),
    }


def conv_arguments(setting: Setting) -> Arguments:
    state = random_tensor(2, 32, 3, seed=4)
    return {
        "x": random_tensor(2, setting.length, 32, seed=1),
        "weight": random_tensor(32, 4, seed=2),
        "bias": random_tensor(32, seed=3),
        # What a run in bf16 leaves behind; other states are rounded to it.
        "initial_state": state.bfloat16().double() if setting.dtype == torch.bfloat16 else state,
        "activation": "silu",
    }


def arguments_of(setting: Setting) -> Arguments:
    """float64 inputs and options."""
    build = {"scan": scan_arguments, "ssd": ssd_arguments, "conv": conv_arguments}[setting.op]
    kept = {name: v for name, v in build(setting).items() if name not in setting.without}
    if setting.with_documents:
        kept["seq_idx"] = document_ids(*DOCUMENTS[setting.length])
    return kept


@functools.cache
def inputs_and_truth(setting: Setting) -> tuple[Arguments, dict[str, Tensor]]:
    """Inputs in the setting's dtype and the reference's results: for all backends only once."""
    inputs = leaves(arguments_of(setting), setting.dtype, PER_POSITION)
    exact = leaves(inputs, torch.float64, set())
    return inputs, run(OPS[setting.op], exact, backend="reference")


def on_gpu(arguments: Arguments) -> Arguments:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("cuda").requires_grad_(value.requires_grad)

    return {name: move(value) for name, value in arguments.items()}


def assert_gpu_agrees(setting: Setting, backend: str, **options: Any) -> None:
    inputs, truth = inputs_and_truth(setting)
    # Twice: a kernel may tune itself in its first run.
    for repetition in range(2):
        found = run(OPS[setting.op], on_gpu(inputs), backend=backend, **options)
        for name, value in truth.items():
            error = relative_error(found[name], value)
            limit = tolerance(setting.dtype, device_type="cuda")
            assert error <= limit, f"{name}: {error:.1e} in run {repetition}"
            if name.startswith("d "):
                assert found[name].dtype == inputs[name[2:]].dtype


@pytest.mark.parametrize("length", DOCUMENTS)
@pytest.mark.parametrize("with_options", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@in_both_precisions
@pytest.mark.parametrize("op", OPS)
def test_a_backend_agrees_at_every_length(
    op: str,
    dtype: torch.dtype,
    with_documents: bool,
    with_options: bool,
    length: int,
    backend: str,
) -> None:
    without = () if with_options else OPTIONS[op]
    assert_gpu_agrees(
        Setting(op, length, dtype, with_documents=with_documents, without=without), backend
    )


@pytest.mark.parametrize(("op", "option"), [(op, option) for op in OPS for option in OPTIONS[op]])
@in_both_precisions
def test_a_backend_agrees_without_any_one_option(
    dtype: torch.dtype, op: str, option: str, backend: str
) -> None:
    assert_gpu_agrees(Setting(op, 65, dtype, without=(option,)), backend)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("op", ["scan", "ssd"])
@in_both_precisions
def test_a_backend_agrees_with_one_group_and_with_many(
    dtype: torch.dtype, op: str, groups: int, backend: str
) -> None:
    assert_gpu_agrees(Setting(op, 200, dtype, groups=groups), backend)


@pytest.mark.parametrize("chunk_size", [16, 64, 100, 256])
@in_both_precisions
def test_ssd_is_the_same_for_every_chunk_size(
    dtype: torch.dtype, chunk_size: int, backend: str
) -> None:
    assert_gpu_agrees(Setting("ssd", 200, dtype), backend, chunk_size=chunk_size)


@pytest.mark.parametrize("case", SHAPES_OF_MODELS, ids=str)
@in_both_precisions
def test_every_op_agrees_at_the_shapes_of_models(
    dtype: torch.dtype, case: Case, backend: str
) -> None:
    found = compare_backends(replace(case, dtype=dtype), [backend], torch.device("cuda"))
    assert not list(found.objections())


@in_both_precisions
def test_cross_entropy_ignores_padding_and_labels_that_are_none(
    dtype: torch.dtype, backend: str
) -> None:
    hidden = random_tensor(2, 200, 32, seed=1).to(dtype)
    weight = random_tensor(64, 32, seed=2).to(dtype)
    labels = torch.randint(0, 60, (2, 200), generator=torch.Generator().manual_seed(3))
    labels[:, ::3] = -100
    exact, moved = (
        [t.to(target).requires_grad_() for t in (hidden, weight)]
        for target in (torch.float64, "cuda")
    )
    truth = linear_cross_entropy(*exact, labels, vocab_size=60, backend="reference")
    loss = linear_cross_entropy(*moved, labels.cuda(), vocab_size=60, backend=backend)
    truth.backward()
    loss.backward()
    limit = tolerance(dtype, device_type="cuda", through_softmax=True)
    assert relative_error(loss, truth) <= limit
    for found, expected in zip(moved, exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert relative_error(found.grad, expected.grad) <= limit
    assert moved[1].grad is not None
    assert not moved[1].grad[60:].any()


@pytest.mark.parametrize(
    ("op", "sizes"), [(op, sizes) for op in OPS for sizes in STEP_CASES[op]], ids=str
)
@in_both_precisions
def test_a_step_of_decoding_agrees(
    dtype: torch.dtype, op: str, sizes: Arguments, backend: str
) -> None:
    limit = tolerance(dtype, device_type="cuda")
    arguments = STEPS[op](**sizes)
    assert_step_agrees(op, arguments, dtype, backend=backend, limit=limit, device="cuda")


@pytest.mark.parametrize(("op", "option"), [(op, o) for op in OPS for o in OPTIONAL[op]])
@in_both_precisions
def test_a_step_of_decoding_agrees_without_any_one_option(
    dtype: torch.dtype, op: str, option: str, backend: str
) -> None:
    limit = tolerance(dtype, device_type="cuda")
    arguments = without(STEPS[op](batch=64), option)
    assert_step_agrees(op, arguments, dtype, backend=backend, limit=limit, device="cuda")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(2048, 8192), (4096, 160), (128, 4096), (4096, 2048), (2048, 50280), (48, 1536), (1000, 77)],
)
@torch.no_grad()
def test_products_of_few_rows_agree(inputs: int, outputs: int, rows: int, backend: str) -> None:
    x, weight, bias = (
        random_tensor(*shape, seed=seed).bfloat16()
        for seed, shape in enumerate([(rows, 1, inputs), (outputs, inputs), (outputs,)])
    )
    exact = x.double() @ weight.double().T
    for added in (None, bias):
        given = [None if tensor is None else tensor.cuda() for tensor in (x, weight, added)]
        truth = exact if added is None else exact + added.double()
        error = relative_error(linear(*given, backend=backend), truth)
        assert error <= tolerance(torch.bfloat16, device_type="cuda")
