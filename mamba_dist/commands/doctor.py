"""tools/doctor.py: what this machine has, which ops backends work on it, and if they are right.

Each available backend is compared with the float64 reference, output and all gradients, at the
sizes, precision and length of a config, as far as the reference is quick enough.

Exit codes: 0 all agree; 1 a backend is out of tolerance or fails; 2 a mistake that the message
explains; anything else is a crash.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mamba_dist.commands.bench.cases import (
    Case,
    layer_cases,
    our_op,
    random_inputs,
    within_reference_time,
)
from mamba_dist.commands.bench.spec import dtype_name
from mamba_dist.commands.machine import package_version, this_machine
from mamba_dist.config.load import LoadedConfig, load_config
from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import BackendError, MambaDistError
from mamba_dist.ops.agreement import Function, errors, tolerance, true_results
from mamba_dist.ops.backend import BackendStatus, describe_backends, resolve_backend
from mamba_dist.ops.native.library import instruction_set

EXIT_OUT_OF_TOLERANCE = 1
EXIT_USER_ERROR = 2
_PACKAGES: Final = (
    "mamba-dist",
    "torch",
    "deepspeed",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "transformers",
)
_REFERENCE: Final = "reference"
_DEFAULT_BATCH: Final = 2
_DEFAULT_LENGTH: Final = 512
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """One op: errors by backend and output; a backend that could not run has a reason instead."""

    case: Case
    asked: Case
    allowed: float
    errors: Mapping[str, Mapping[str, float]]
    failures: Mapping[str, str]

    def objections(self) -> Iterator[str]:
        """What is wrong, a line each."""
        for backend, reason in self.failures.items():
            yield f"{backend}: {self.case.op}: {reason}"
        for backend, by_output in self.errors.items():
            for output, error in by_output.items():
                # NaN compares false.
                if not error <= self.allowed:
                    yield f"{backend}: {self.case.op}: {output} is off by {error:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`; the findings go to stdout."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.overrides and arguments.config is None:
        parser.error(f"{arguments.overrides[0]} replaces a field of a config; give --config too")
    try:
        loaded = load_config(arguments.config, arguments.overrides) if arguments.config else None
        device = torch.device(arguments.device or _best_device())
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError("--device cuda: torch sees no GPU here; leave the option out")
        objections = _examine(loaded, device, compares=not arguments.list)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    for line in objections:
        print(f"WRONG: {line}")
    if not objections and not arguments.list:
        print("every backend that is available agrees with the reference")
    return EXIT_OUT_OF_TOLERANCE if objections else 0


def compare(case: Case, functions: Mapping[str, Function], device: torch.device) -> Comparison:
    """Errors of implementations of one op against the float64 reference on the CPU."""
    quick = within_reference_time(case)
    inputs = random_inputs(quick, device=device)
    truth = true_results(our_op(quick, _REFERENCE), inputs)
    found: dict[str, Mapping[str, float]] = {}
    failures: dict[str, str] = {}
    for name, function in functions.items():
        try:
            found[name] = errors(_as_in_training(function, quick, device), inputs, truth)
        except MambaDistError as error:
            failures[name] = str(error)
        # A backend that breaks in its own way is what this command is asked about.
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    allowed = tolerance(
        case.dtype,
        device_type=device.type,
        through_softmax=case.op == "linear_cross_entropy",
    )
    return Comparison(quick, case, allowed, found, failures)


def compare_backends(case: Case, names: Sequence[str], device: torch.device) -> Comparison:
    """`compare` of our own backends, by name."""
    # The size of the vocabulary is an argument of the op, not only of its inputs.
    quick = within_reference_time(case)
    return compare(case, {name: our_op(quick, name) for name in names}, device)


def _examine(loaded: LoadedConfig | None, device: torch.device, *, compares: bool) -> list[str]:
    """What is wrong, after printing everything."""
    for line in loaded.account if loaded else ():
        print(line)
    _print_machine()
    statuses = describe_backends(device.type)
    _print_backends(statuses, device)
    objections = _choice(loaded, device)
    if not compares:
        return objections
    names = [s.name for s in statuses if s.available and s.name != _REFERENCE]
    print("Largest error of each output and gradient, relative to its largest entry\n")
    for case in _cases(loaded):
        comparison = compare_backends(case, names, device)
        print(_table(comparison), flush=True)
        objections += comparison.objections()
    return objections


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/doctor.py",
        description="Say which ops backends work on this machine, and compare them with the "
        "reference at the sizes of a config.",
    )
    parser.add_argument("--config", help="YAML or JSON file, see configs/; default: a small model")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replace single fields of the config",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="say what is here and build what has to be built, but compare nothing",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    return parser


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_machine() -> None:
    versions = [(name, package_version(name)) for name in _PACKAGES]
    machine = this_machine()
    gpus = [
        f"{properties.name} ({properties.total_memory / _GIB:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor})"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    lines = {
        "packages": ", ".join(f"{n} {v}" for n, v in versions if v is not None),
        "absent": ", ".join(n for n, v in versions if v is None) or "none",
        "system": f"{machine.system}, {platform.machine()}, Python {machine.python}",
        "processor": f"{machine.cores} cores of {machine.processor}, {machine.memory_gib:.0f} GiB",
        "instructions": f"{' '.join(machine.flags)}; native kernels are built for "
        f"{instruction_set()}",
        "GPU": ", ".join(gpus) or "none that torch sees",
    }
    for name, text in lines.items():
        print(f"{name:14}{text}")
    print()


def _print_backends(statuses: Sequence[BackendStatus], device: torch.device) -> None:
    print(f"Backends on {device.type} (engine.ops_backend)")
    for status in statuses:
        state = "available" if status.available else "absent"
        print(f"  {status.name:12}{state:12}{status.detail}")


def _choice(loaded: LoadedConfig | None, device: torch.device) -> list[str]:
    """Prints which backend a run would take; the objection if there is none."""
    requested = loaded.config.engine.ops_backend if loaded else "auto"
    try:
        chosen = resolve_backend(requested, device_type=device.type)
    except BackendError as error:
        print()
        return [f"engine.ops_backend: {error}"]
    print(f"  {requested!r} takes {chosen!r} here\n")
    return []


def _cases(loaded: LoadedConfig | None) -> list[Case]:
    if loaded is None:
        cases = [
            case
            for layer in ("mamba1", "mamba2")
            for case in layer_cases(
                MambaConfig.model_validate({"layer": layer, "d_model": 256, "vocab_size": 4096}),
                batch=_DEFAULT_BATCH,
                length=_DEFAULT_LENGTH,
                dtype=torch.float32,
            )
        ]
        # Both kinds of layer have the same head and the same projections in.
        return list({str(case): case for case in cases}.values())
    config = loaded.config
    return layer_cases(
        config.model,
        batch=config.training.micro_batch_size,
        length=config.data.sequence_length,
        dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
    )


def _as_in_training(function: Function, case: Case, device: torch.device) -> Function:
    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            return function(inputs)

    return call


def _table(comparison: Comparison) -> str:
    case, asked = comparison.case, comparison.asked
    reduced = [
        f"{letter}{asked.sizes[letter]}"
        for letter, size in case.sizes.items()
        if size != asked.sizes[letter]
    ]
    note = f" (reduced from {' '.join(reduced)} for the reference's sake)" if reduced else ""
    names = list(comparison.errors)
    lines = [
        f"{case}, {dtype_name(case.dtype)}, tolerance {comparison.allowed:.0e}{note}",
        "  " + f"{'':16}" + "".join(f"{name:>12}" for name in names),
    ]
    outputs = list(comparison.errors[names[0]]) if names else []
    for output in outputs:
        cells = (_cell(comparison.errors[name][output], comparison.allowed) for name in names)
        lines.append(f"  {output:16}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"  {name} failed: {reason}" for name, reason in comparison.failures.items()]
    return "\n".join([*lines, ""])


def _cell(error: float, allowed: float) -> str:
    return f"{error:.1e}" + (" " if error <= allowed else "!")
