"""How precise the variants of bench gpu-ops are: outputs and all gradients of the same inputs.

The figure is ||x - truth|| / ||truth||, which averages over a tensor's entries, so that two
variants can be compared by it; whether a variant is right is judged as everywhere else, by the
largest deviation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from mamba_dist.commands.bench.cases import Case, within_reference_time
from mamba_dist.commands.bench.gpu.failures import Attempts, Failure
from mamba_dist.commands.bench.gpu.peers import (
    OURS,
    OUTPUTS,
    Inputs,
    Variant,
    expected_outputs,
    initial_state,
    model_inputs,
    our_call,
    variant,
)
from mamba_dist.ops.agreement import relative_error, tolerance, worst

# Several chunks and tiles of every kernel, and a truth within about a second.
_CHECKED_SIZES: Final = {"B": 2, "L": 320, "E": 256, "H": 4, "V": 5032}
# As in bench ops: that a peer computes the same function is asked, not how it rounds.
_PEER_SLACK: Final = 10


@dataclass(frozen=True)
class Row:
    """One line of a table: a variant, alone or with packed documents.

    name: of a backend of ours or of a peer.
    """

    name: str
    documents: bool = False

    def __str__(self) -> str:
        return f"{self.name}, documents" if self.documents else self.name

    @property
    def is_ours(self) -> bool:
        """Whether it is a backend of ours."""
        return self.name in OURS


@dataclass(frozen=True)
class Precision:
    """Errors of one op's rows against the float64 reference, by tensor.

    case: the sizes at which they were compared. l2: ||x - truth|| / ||truth||.
    objections: why a row is wrong or could not run.
    """

    case: Case
    l2: Mapping[Row, Mapping[str, float]]
    objections: Mapping[Row, str]


class Job:
    """One variant on given inputs, forward and backward, again and again.

    Args:
        inputs: in our layout; floating ones get gradients.
        gradients: of the outputs, in our layout.
    """

    def __init__(self, case: Case, variant: Variant, inputs: Inputs, gradients: Inputs) -> None:
        self._case = case
        self._variant = variant
        self._given = gradients
        self._inputs = {
            name: variant.laid_out(name, tensor).detach().requires_grad_(tensor.is_floating_point())
            for name, tensor in inputs.items()
        }
        self._leaves = {n: t for n, t in self._inputs.items() if t.requires_grad}
        self._outputs: dict[str, Tensor] = {}
        self._output_gradients: list[Tensor] | None = None

    def infer(self) -> None:
        """The outputs, with nothing kept for a backward."""
        with torch.no_grad():
            self._called()

    def forward(self) -> None:
        """The outputs, and what the backward needs of them."""
        self._outputs = self._called()

    def backward(self) -> tuple[Tensor, ...]:
        """Gradients of all floating inputs, after a `forward`, whose outputs are given up."""
        outputs, self._outputs = self._outputs, {}
        if self._output_gradients is None:
            self._output_gradients = self._gradients(outputs)
        return torch.autograd.grad(
            list(outputs.values()), list(self._leaves.values()), self._output_gradients
        )

    def results(self) -> dict[str, Tensor]:
        """The outputs, and the gradient "d <name>" of each floating input, in our layout."""
        self.forward()
        outputs = {n: self._variant.restored(n, t.detach()) for n, t in self._outputs.items()}
        gradients = zip(self._leaves, self.backward(), strict=True)
        return outputs | {f"d {n}": self._variant.restored(n, t) for n, t in gradients}

    def _called(self) -> dict[str, Tensor]:
        bf16 = self._case.dtype == torch.bfloat16
        device_type = next(iter(self._inputs.values())).device.type
        # As in training: the products of the head follow autocast, all else ignores it.
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            outputs = self._variant.call(self._inputs)
        return dict(zip(OUTPUTS[self._case.op], outputs, strict=False))

    def _gradients(self, outputs: Inputs) -> list[Tensor]:
        return [
            self._variant.laid_out(name, self._given[name]).to(tensor)
            for name, tensor in outputs.items()
        ]


def output_gradients(outputs: Inputs) -> dict[str, Tensor]:
    """Standard normal numbers that bf16 holds exactly, so the same ones in every dtype."""
    return {
        name: torch.randn(
            tensor.shape,
            generator=torch.Generator(tensor.device).manual_seed(90 + number),
            device=tensor.device,
        ).bfloat16()
        for number, (name, tensor) in enumerate(outputs.items())
    }


def relative_l2(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| in float64, on the truth's device; NaN if an entry is NaN."""
    exact = truth.detach().double()
    deviation = found.detach().to(exact.device).double() - exact
    scale = torch.linalg.vector_norm(exact).clamp_min(1e-30)
    return float(torch.linalg.vector_norm(deviation) / scale)


def precision(case: Case, rows: Iterable[Row], attempts: Attempts) -> Precision:
    """Errors of all rows at sizes that the float64 reference can do.

    Rows with documents start from a state and are judged by their final state too.
    """
    quick = checked(case)
    l2: dict[Row, dict[str, float]] = {}
    objections: dict[Row, str] = {}
    given: dict[bool, tuple[Inputs, Inputs, Inputs]] = {}

    def errors(row: Row) -> tuple[dict[str, float], dict[str, float]]:
        if row.documents not in given:
            as_in_model = replace(quick, as_in_model=row.documents)
            given[row.documents] = _truth(as_in_model, attempts.device)
        inputs, gradients, truth = given[row.documents]
        job = Job(quick, variant(quick, row.name, attempts.device), inputs, gradients)
        found = job.results()
        return (
            {name: relative_l2(found[name], value) for name, value in truth.items()},
            {name: relative_error(found[name], value) for name, value in truth.items()},
        )

    for row in rows:
        found = attempts.told(f"{row} in {quick}", partial(errors, row))
        if isinstance(found, Failure):
            objections[row] = found.reason
            continue
        l2[row], largest = found
        slack = 1 if row.is_ours else _PEER_SLACK
        if reason := _objection(largest, slack * _tolerance(case, attempts.device)):
            objections[row] = reason
    return Precision(quick, l2, objections)


def checked(case: Case) -> Case:
    """The case with few rows, steps and channels; the widths that kernels are built for stay."""
    sizes = {
        letter: min(size, _CHECKED_SIZES.get(letter, size)) for letter, size in case.sizes.items()
    }
    if "H" in sizes:
        # Whole groups of heads.
        sizes["H"] = max(sizes["G"], sizes["H"] // sizes["G"] * sizes["G"])
    return within_reference_time(replace(case, sizes=sizes))


def largest_difference(case: Case, device: torch.device) -> float:
    """Above it, two variants have not just rounded differently; nobody knows which one is right."""
    return _PEER_SLACK * _tolerance(case, device)


def difference(found: Inputs, other: Inputs) -> tuple[str, float]:
    """The tensor in which two variants differ most, and by how much, as `relative_l2`."""
    return worst({name: relative_l2(found[name], other[name]) for name in other})


def _truth(case: Case, device: torch.device) -> tuple[Inputs, Inputs, Inputs]:
    """Inputs on the device, gradients of the outputs, and the float64 results on the CPU."""
    inputs = model_inputs(case, device)
    state = initial_state(case, device) if case.as_in_model else None
    if state is not None:
        inputs["initial_state"] = state
    exact = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in inputs.items()}
    in_float64 = replace(case, dtype=torch.float64)
    reference = Variant("reference", our_call(in_float64, "reference"))
    gradients = output_gradients(expected_outputs(case.op, exact))
    return inputs, gradients, Job(in_float64, reference, exact, gradients).results()


def _tolerance(case: Case, device: torch.device) -> float:
    return tolerance(
        case.dtype, device_type=device.type, through_softmax=case.op == "linear_cross_entropy"
    )


def _objection(errors: Mapping[str, float], limit: float) -> str | None:
    name, error = worst(errors)
    # NaN compares false.
    return None if error <= limit else f"{name} is off by {error:.1e}, allowed {limit:.0e}"
