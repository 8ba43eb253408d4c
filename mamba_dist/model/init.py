"""Initial values of every parameter: one table, one function that applies it, one that audits it.

The rules are those of state-spaces/mamba (`mamba_simple.py`, `mamba2.py`, `mixer_seq_simple.py`),
except that out_proj is rescaled once; upstream's `_init_weights` runs for each enclosing module.

Each parameter has its own generator, seeded by the run's seed and the parameter's name: values
depend neither on the order of parameters nor on their sharding nor on the number of ranks.

E d_inner, N d_state, R dt_rank, H heads, K d_conv.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import ModelError

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]]

# A sound initialisation exceeds so many standard errors once in 10^9 statistics.
_SIGMAS: Final = 6.5
_SUMMED_ELEMENTS: Final = 1 << 20
_MAMBA2_A_RANGE: Final = (1.0, 16.0)


@dataclass(frozen=True)
class InitRule:
    """How parameters of one kind start.

    `fill` writes the values into a CPU fp32 tensor of the parameter's shape; `check` gives the
    deviation of a parameter from its rule in words, or None if it fits.
    """

    text: str
    fill: Callable[[Tensor, MambaConfig, Generator], None]
    check: Callable[[Tensor, MambaConfig], str | None]


def init_rule(name: str) -> InitRule:
    """The rule of the parameter called `name` in the bare model.

    Raises:
        ModelError: no rule or more than one covers the name.
    """
    found = [rule for pattern, rule in _TABLE if pattern.fullmatch(name)]
    if len(found) != 1:
        raise ModelError(
            f"parameter {name} has {len(found)} initialisation rules, expected exactly one; "
            "the table is in mamba_dist/model/init.py"
        )
    return found[0]


@torch.no_grad()
def initialize(model: nn.Module, config: MambaConfig, *, seed: int, gather: Gather) -> None:
    """Sets every parameter by its rule; the same seed gives the same bits, however often called.

    `gather` gives the context in which the model holds parameters that are whole and writable (all
    ranks write the same values).

    Raises:
        ModelError: a parameter has no rule or no storage.
    """
    for name, parameter in model.named_parameters():
        rule = init_rule(name)
        if parameter.is_meta:
            raise ModelError(f"parameter {name} is on the meta device and cannot be initialised")
        with gather([parameter]):
            # An engine may have put another one in its place.
            whole = model.get_parameter(name)
            values = torch.empty(whole.shape, dtype=torch.float32)
            rule.fill(values, config, Generator().manual_seed(_stream(seed, name)))
            whole.copy_(values)


@torch.no_grad()
def audit(model: nn.Module, config: MambaConfig, *, gather: Gather) -> None:
    """Returns if every parameter is fp32 and follows its rule; to be called before the first step.

    Fixed values are compared exactly, random ones by range, mean and standard deviation.

    Raises:
        ModelError: naming the first parameter that does not fit, and how.
    """
    for name, parameter in model.named_parameters():
        rule = init_rule(name)
        with gather([parameter]):
            whole = model.get_parameter(name)
            if whole.dtype != torch.float32:
                deviation: str | None = f"its dtype is {whole.dtype}, expected torch.float32"
            elif not bool(torch.isfinite(whole).all()):
                deviation = "it holds values that are not finite"
            else:
                deviation = rule.check(whole.detach().cpu(), config)
        if deviation:
            raise ModelError(
                f"parameter {name} is not initialised as its rule says ({rule.text}): {deviation}"
            )


def _stream(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _constant(value: float) -> InitRule:
    def fill(values: Tensor, config: MambaConfig, generator: Generator) -> None:
        values.fill_(value)

    def check(values: Tensor, config: MambaConfig) -> str | None:
        wrong = int((values != value).sum())
        return f"{wrong} of {values.numel()} values are not {value:g}" if wrong else None

    return InitRule(f"{value:g}", fill, check)


def _uniform(text: str, bound: Callable[[Tensor, MambaConfig], float]) -> InitRule:
    def fill(values: Tensor, config: MambaConfig, generator: Generator) -> None:
        limit = bound(values, config)
        values.uniform_(-limit, limit, generator=generator)

    def check(values: Tensor, config: MambaConfig) -> str | None:
        limit = bound(values, config)
        return _uniform_deviation(values, -limit, limit)

    return InitRule(text, fill, check)


def _fan_in_bound(weight: Tensor) -> float:
    # kaiming_uniform_(a=sqrt(5)), the default of nn.Linear and nn.Conv1d, is U(+-1/sqrt(fan_in)).
    return 1 / math.sqrt(math.prod(weight.shape[1:]))


def _out_proj_bound(weight: Tensor, config: MambaConfig) -> float:
    # One residual addition per layer (GPT-2's scheme); with MLPs there would be two.
    residuals_per_layer = 1
    return _fan_in_bound(weight) / math.sqrt(residuals_per_layer * config.n_layers)


def _fill_embedding(values: Tensor, config: MambaConfig, generator: Generator) -> None:
    values.normal_(0.0, config.initializer_range, generator=generator)


def _check_embedding(values: Tensor, config: MambaConfig) -> str | None:
    # A normal variable's standard deviation has relative standard error 1/sqrt(2n).
    return _moment_deviation(values, 0.0, config.initializer_range, std_error=math.sqrt(0.5))


def _fill_dt_bias(values: Tensor, config: MambaConfig, generator: Generator) -> None:
    # mamba_simple.py: dt is log-uniform, its bias the inverse of softplus.
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = values.uniform_(generator=generator).mul_(high - low).add_(low).exp_()
    dt.clamp_(min=config.dt_init_floor)
    values.copy_(dt + torch.log(-torch.expm1(-dt)))


def _check_dt_bias(values: Tensor, config: MambaConfig) -> str | None:
    log_dt = F.softplus(values.double()).log()
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    floor = math.log(config.dt_init_floor)
    if low < floor:
        # The clamp piles values up at the floor, so only the range is certain.
        return _range_deviation(log_dt, floor, max(high, floor))
    return _uniform_deviation(log_dt, low, high)


def _fill_a_log(values: Tensor, config: MambaConfig, generator: Generator) -> None:
    if config.layer == "mamba1":
        values.copy_(_s4d_real(values))
    else:
        values.uniform_(*_MAMBA2_A_RANGE, generator=generator).log_()


def _check_a_log(values: Tensor, config: MambaConfig) -> str | None:
    if config.layer == "mamba2":
        return _uniform_deviation(values.exp(), *_MAMBA2_A_RANGE)
    wrong = int((values != _s4d_real(values)).sum())
    return f"{wrong} of {values.numel()} values are not ln(1..N)" if wrong else None


def _s4d_real(a_log: Tensor) -> Tensor:
    """ln(1..N) in every row, (E, N): S4D-Real, arXiv 2206.11893."""
    return torch.arange(1, a_log.shape[1] + 1, dtype=torch.float32).log().expand(a_log.shape)


def _uniform_deviation(values: Tensor, low: float, high: float) -> str | None:
    # A uniform variable's kurtosis is 1.8, so its standard deviation has error sqrt(0.8 / 4n).
    return _range_deviation(values, low, high) or _moment_deviation(
        values, (low + high) / 2, (high - low) / math.sqrt(12), std_error=math.sqrt(0.2)
    )


def _range_deviation(values: Tensor, low: float, high: float) -> str | None:
    slack = 1e-5 * max(abs(low), abs(high))
    smallest, largest = float(values.min()), float(values.max())
    if low - slack <= smallest and largest <= high + slack:
        return None
    return f"values range over {smallest:g} to {largest:g}, expected {low:g} to {high:g}"


def _moment_deviation(values: Tensor, mean: float, std: float, *, std_error: float) -> str | None:
    """`std_error` is the relative standard error of the standard deviation, times sqrt(n)."""
    count = values.numel()
    if count > 1 and std > 0 and bool((values == values[(0,) * values.dim()]).all()):
        return f"all {count} values are equal, expected random ones"
    # In fp64 an embedding would take six times its memory at once.
    parts = torch.split(values.flatten(), _SUMMED_ELEMENTS)
    found_mean = sum(float(part.double().sum()) for part in parts) / count
    squared = sum(float((part.double() - mean).square().sum()) for part in parts)
    found_std = math.sqrt(squared / count)
    bound = _SIGMAS / math.sqrt(count)
    # Rounding may move a distribution of zero width.
    slack = 1e-5 * abs(mean)
    if abs(found_mean - mean) > bound * std + slack:
        return f"the mean of {count} values is {found_mean:g}, expected {mean:g}"
    if abs(found_std - std) > bound * std_error * std + slack:
        return f"the standard deviation of {count} values is {found_std:g}, expected {std:g}"
    return None


_MIXER: Final = r"backbone\.layers\.\d+\.mixer\."
_FAN_IN: Final = _uniform("U(+-1/sqrt(fan_in))", lambda weight, _: _fan_in_bound(weight))
_TABLE: Final = tuple(
    (re.compile(pattern), rule)
    for pattern, rule in (
        (
            r"backbone\.embedding\.weight",
            InitRule("N(0, initializer_range)", _fill_embedding, _check_embedding),
        ),
        (r"lm_head\.weight", _FAN_IN),
        (r"backbone\.(layers\.\d+\.norm|norm_f)\.weight", _constant(1.0)),
        (_MIXER + r"norm\.weight", _constant(1.0)),
        (_MIXER + r"(in_proj|x_proj|conv1d)\.weight", _FAN_IN),
        (_MIXER + r"(in_proj|out_proj)\.bias", _constant(0.0)),
        (
            _MIXER + r"conv1d\.bias",
            _uniform("U(+-1/sqrt(d_conv))", lambda _, config: config.d_conv**-0.5),
        ),
        (
            _MIXER + r"dt_proj\.weight",
            _uniform(
                "U(+-dt_scale/sqrt(dt_rank))",
                lambda _, config: config.dt_scale * config.resolved_dt_rank**-0.5,
            ),
        ),
        (
            _MIXER + r"(dt_proj\.bias|dt_bias)",
            InitRule("softplus^-1 of log-uniform dt", _fill_dt_bias, _check_dt_bias),
        ),
        (
            _MIXER + r"A_log",
            InitRule("Mamba-1 ln(1..N), Mamba-2 ln U(1, 16)", _fill_a_log, _check_a_log),
        ),
        (_MIXER + r"D", _constant(1.0)),
        (
            _MIXER + r"out_proj\.weight",
            _uniform("U(+-1/sqrt(fan_in)) / sqrt(n_layers)", _out_proj_bound),
        ),
    )
)
