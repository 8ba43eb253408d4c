"""Whether all nodes can run what they were started for, asked before anything large is built.

Each rank looks at itself and tells all others; the objections of all of them are raised as one
error, each once with the ranks and hosts that have it, so that none costs a start of its own.
Nothing is refused that a run survives: that is a warning.
"""

import hashlib
import json
import logging
import platform
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from mamba_dist.config.batch import batch_plan
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.dataset import open_dataset
from mamba_dist.engine.world import World
from mamba_dist.errors import BackendError, ConfigError, MambaDistError, ShortageError, StartError
from mamba_dist.telemetry.merged_log import numbered
from mamba_dist.train.build import Prepared, open_matching_sources, prepare
from mamba_dist.train.engines import ops_backend
from mamba_dist.train.room import disk_objections, memory_objections, shared_memory_warning
from mamba_dist.train.run_folder import HeldFolder, run_folder

_log = logging.getLogger(__name__)

# What must be the same on all ranks, and what to do where it is not.
_SAME: Final = MappingProxyType(
    {
        "the config": "give every rank the same file and overrides",
        "Python": "use one environment on all nodes",
        "torch": "use one environment on all nodes",
        "deepspeed": "use one environment on all nodes",
        "mamba-dist": "use one environment on all nodes",
        "the code of mamba-dist": "use one environment, or one checkout, on all nodes",
        "the data": "give every node the same data sets",
        "the ops backend": "see `python tools/doctor.py --list` on each, or set engine.ops_backend",
    }
)
# What may differ, at a price.
_BETTER_SAME: Final = MappingProxyType({"the GPU": "all wait for the slowest at every step"})
# SLURM's munge begins to refuse at some minutes; logs merge in the wrong order from here on.
_CLOCKS_WITHIN_S = 5.0
_SHOWN_HOSTS = 8
_SOURCES: Final = frozenset((".py", ".cpp", ".h", ".cu", ".cuh"))


@dataclass(frozen=True)
class Findings:
    """What one rank found; facts are compared over ranks, as far as it tells them."""

    rank: int
    host: str
    clock_s: float
    """Seconds since 1970, right after all ranks met."""
    facts: Mapping[str, str]
    problems: Sequence[str] = ()
    shortages: Sequence[str] = ()
    """Problems that may be gone when it is started again."""
    warnings: Sequence[str] = ()
    crash: str = ""
    """What this rank will end with once it has told."""


def prepare_and_check(config: RunConfig, folder: HeldFolder, *, world: World) -> Prepared:
    """The data and batches of the run, if no rank objects to anything.

    Raises:
        StartError: the objections of all ranks.
        ShortageError: nothing but what may be gone when it is started again.
        RuntimeError: a rank could not look; that one raises what stopped it.
    """
    world.barrier()
    clock_s = time.time()
    ranks_on_host = len(world.on_this_host())
    prepared, failure = None, None
    try:
        own, prepared = _look_around(
            config, folder, world=world, clock_s=clock_s, ranks_on_host=ranks_on_host
        )
    # A rank that left now would leave the others to the timeout of what follows.
    except Exception as error:
        failure, crash = error, f"{type(error).__name__}: {error}"
        own = Findings(world.rank, socket.gethostname(), clock_s, {}, crash=crash)
    told = [Findings(**json.loads(t)) for t in world.texts_of_all_ranks(json.dumps(asdict(own)))]
    if failure is not None:
        raise failure
    crashed = [one for one in told if one.crash]
    if crashed:
        raise RuntimeError(f"{_named(crashed)} crashed at the start: {crashed[0].crash}")
    if world.rank == 0:
        for line in warnings_of(told):
            _log.warning("%s", line)
    problems, shortages = problems_of(told), _once(told, [one.shortages for one in told])
    if problems or shortages:
        kind = StartError if problems else ShortageError
        raise kind(_as_one([*problems, *shortages]))
    assert prepared is not None
    return prepared


def _as_one(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    numbers = (f"\n  {number}. {text}" for number, text in enumerate(problems, 1))
    return f"{len(problems)} problems at the start of the run:{''.join(numbers)}"


def problems_of(told: Sequence[Findings]) -> list[str]:
    """What all ranks object to, each objection once."""
    return _differences(told, _SAME) + _once(told, [one.problems for one in told])


def warnings_of(told: Sequence[Findings]) -> list[str]:
    """What a run survives, each once."""
    lines = _differences(told, _BETTER_SAME) + _once(told, [one.warnings for one in told])
    first, last = (pick(told, key=lambda one: one.clock_s) for pick in (min, max))
    if last.clock_s - first.clock_s > _CLOCKS_WITHIN_S:
        lines.append(
            f"the clock of {last.host} is {last.clock_s - first.clock_s:.0f} s ahead of that of "
            f"{first.host}: merged logs will be out of order, and SLURM may refuse the node; "
            "see to its time server (chronyc tracking)"
        )
    return lines


def _look_around(
    config: RunConfig, folder: HeldFolder, *, world: World, clock_s: float, ranks_on_host: int
) -> tuple[Findings, Prepared | None]:
    problems, warnings, prepared = [], [], None
    shortages: list[str] = []
    facts = {
        "the config": _digest([config.model_dump_json().encode()]),
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "mamba-dist")},
    }
    if not folder.is_seen():
        problems.append(
            f"{run_folder(config)} is not seen as rank 0 wrote it; put it on a file system that "
            "all nodes share (training.run_dir=…)"
        )
    try:
        prepared = prepare(config, ranks=world.size)
        facts["the data"] = _described(prepared)
    except MambaDistError as error:
        problems += _why_not_prepared(config, error, ranks=world.size)
    # What it may object to besides is a problem already.
    with suppress(ConfigError):
        too_little, shortages = memory_objections(config, world=world, ranks_on_host=ranks_on_host)
        problems += too_little
    try:
        facts["the ops backend"] = ops_backend(config, device_type=world.device.type, log=False)
    except BackendError as error:
        problems.append(str(error))
    if world.device.type == "cuda":
        facts["the GPU"], objection = _gpu(world.device)
        problems += objection
    if world.local_rank == 0:
        facts["the code of mamba-dist"] = _code_digest()
        warnings += shared_memory_warning(world)
    if world.rank == 0:
        too_little, little = disk_objections(config, ranks=world.size)
        problems += too_little
        warnings += little
    host = socket.gethostname()
    return Findings(world.rank, host, clock_s, facts, problems, shortages, warnings), prepared


def _why_not_prepared(config: RunConfig, first: MambaDistError, *, ranks: int) -> list[str]:
    """What else stands in the way behind the first error."""
    found = [str(first)]
    looks: list[Callable[[], object]] = [
        partial(batch_plan, config, ranks),
        *(partial(open_dataset, source.path) for source in config.data.all_sources),
        partial(open_matching_sources, config),
    ]
    for look in looks:
        try:
            look()
        except MambaDistError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _described(prepared: Prepared) -> str:
    sources = prepared.fresh.segments[0].sources
    return ", ".join(
        f"{s.path} (fingerprint {s.fingerprint[:12]}, {s.samples:,} samples)" for s in sources
    )


def _gpu(device: torch.device) -> tuple[str, list[str]]:
    """What it is, and whether this torch was built for it."""
    properties = torch.cuda.get_device_properties(device)
    major, minor = properties.major, properties.minor
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return name, unsupported(name, (major, minor), torch.cuda.get_arch_list())


def unsupported(name: str, capability: tuple[int, int], built_for: Sequence[str]) -> list[str]:
    """The objection to a GPU for which none of torch's kernels, such as sm_90 or compute_90, is."""
    major, minor = capability
    for architecture in built_for:
        kind, _, number = architecture.partition("_")
        number = number.rstrip("af")
        if not number.isdigit():
            continue
        other = divmod(int(number), 10)
        # Machine code runs on later ones of its generation, PTX is compiled for all later ones.
        if other <= (major, minor) and (kind == "compute" or other[0] == major):
            return []
    if not built_for:
        return []
    return [
        f"{name} has compute capability {major}.{minor}, and this torch {torch.__version__} is "
        f"built for {', '.join(built_for)}; install another build of torch"
    ]


def _code_digest() -> str:
    package = Path(__file__).parents[1]
    # An editor that has a file open may have a link to nowhere beside it.
    files = sorted(p for p in package.rglob("*") if p.suffix in _SOURCES and p.is_file())
    return _digest(part for p in files for part in (bytes(p.relative_to(package)), p.read_bytes()))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _differences(told: Sequence[Findings], advice: Mapping[str, str]) -> list[str]:
    return [
        f"{name} differs: "
        + "; ".join(f"{value}{_where(ranks, told)}" for value, ranks in values.items())
        + f"; {advice[name]}"
        for name in advice
        if len(values := _by_value(told, name)) > 1
    ]


def _by_value(told: Iterable[Findings], name: str) -> dict[str, list[Findings]]:
    values: dict[str, list[Findings]] = {}
    for one in told:
        if name in one.facts:
            values.setdefault(one.facts[name], []).append(one)
    return values


def _once(told: Sequence[Findings], texts: Sequence[Sequence[str]]) -> list[str]:
    by_text: dict[str, list[Findings]] = {}
    for one, own in zip(told, texts, strict=True):
        for text in own:
            by_text.setdefault(text, []).append(one)
    return [f"{_prefix(ranks, told)}{text}" for text, ranks in by_text.items()]


def _prefix(ranks: Sequence[Findings], told: Sequence[Findings]) -> str:
    return "" if len(ranks) == len(told) else f"{_named(ranks)}: "


def _where(ranks: Sequence[Findings], told: Sequence[Findings]) -> str:
    return f" on {_named(ranks)}" if len(told) > 1 else ""


def _named(ranks: Sequence[Findings]) -> str:
    hosts = list(dict.fromkeys(one.host for one in ranks))
    more = len(hosts) - _SHOWN_HOSTS
    shown = ", ".join(hosts[:_SHOWN_HOSTS]) + f" and {more} more" * (more > 0)
    return f"{shown} ({numbered('rank', (one.rank for one in ranks))})"
