"""tools/plan.py: memory by stage and activation checkpointing, work and time of a run.

All from the config: no data is opened, nothing is built, torch is not imported.

Exit codes: 0 the run fits as configured; 1 it does not; 2 a mistake that the message explains;
anything else is a crash.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

from mamba_dist.checkpoint.free_memory import available_bytes
from mamba_dist.commands.arguments import positive_int
from mamba_dist.config.batch import batch_plan
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import ActivationCheckpointing, RunConfig
from mamba_dist.errors import MambaDistError
from mamba_dist.model.flops import flops_per_token, parameter_count
from mamba_dist.train.memory import GIB, SAVED_BYTES, MemoryPlan, engine_title, memory_plan
from mamba_dist.train.schedule import total_steps

EXIT_DOES_NOT_FIT = 1
EXIT_USER_ERROR = 2
# An allocator has holes: up to 17 % more was reserved than allocated (BENCHMARKS, ZeRO 1).
_ROOM: Final = 1.1


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card: usable memory, and dense peaks of NVIDIA's data sheets in TFLOP/s."""

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


GPUS: Final = {
    "a100-40": Gpu(39.4, 312, 19.5),
    "a100": Gpu(79.1, 312, 19.5),
    "h100": Gpu(79.1, 989, 67),
    "h200": Gpu(139.8, 989, 67),
}
# Time of a step over that of stage 0 and no recomputation: what one H100 and two H200s showed.
_ENGINE_TIME: Final = {"zero-0": 1.0, "zero-1": 1.2, "zero-2": 1.3, "fsdp2": 1.5, "zero-3": 2.2}
_CHECKPOINTING_TIME: Final = {"none": 1.0, "selective": 1.06, "full": 1.33}
# Of one H100 at stage 0, whose models of 130m to 1.4B reached 24 to 35 % (BENCHMARKS).
_MFU: Final = 0.3
_COLUMNS: Final = ("parameters", "gradients", "optimizer", "buffers")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is planned for: `memory` bytes for each GPU, or on CPUs for all ranks of the host."""

    name: str
    ranks: int
    on_gpu: bool
    memory: float

    @property
    def per_rank(self) -> float:
        """Bytes that a rank may take."""
        return self.memory if self.on_gpu else self.memory / self.ranks

    def verdict(self, plan: MemoryPlan) -> str:
        """yes, tight (it fits, if the allocator leaves no holes) or no."""
        if plan.peak * _ROOM <= self.per_rank:
            return "yes"
        return "tight" if plan.peak <= self.per_rank else "no"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if _names_gpus(arguments) and (arguments.ranks or arguments.memory):
        parser.error("--ranks and --memory are for CPUs; with GPUs use --gpus and --gpu-memory")
    try:
        config = load_config(arguments.config, arguments.overrides).config
        machine = _machine(arguments)
        chosen = memory_plan(config, ranks=machine.ranks, on_gpu=machine.on_gpu)
        plans = list(_plans(config, machine))
        work = _work(config, machine, arguments, time=_time(chosen))
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments.json:
        print(json.dumps(_as_json(machine, chosen, plans, work), indent=2))
    else:
        _print(config, machine, chosen, plans, work)
    return 0 if machine.verdict(chosen) != "no" else EXIT_DOES_NOT_FIT


def _names_gpus(arguments: argparse.Namespace) -> bool:
    return any((arguments.gpu, arguments.gpus, arguments.gpu_memory))


def _machine(arguments: argparse.Namespace) -> Machine:
    gpu = GPUS.get(arguments.gpu or "")
    if not _names_gpus(arguments):
        memory = available_bytes() if arguments.memory is None else arguments.memory * GIB
        name = "this host's free memory" if arguments.memory is None else "CPUs"
        return Machine(name, arguments.ranks or 1, False, memory)
    ranks = arguments.gpus or 1
    gib = arguments.gpu_memory or (gpu or GPUS["h100"]).memory_gib
    return Machine(arguments.gpu or "h100", ranks, True, gib * GIB)


def _plans(config: RunConfig, machine: Machine) -> Iterator[MemoryPlan]:
    """Each engine and stage that differs on so many ranks, with each way of recomputing."""
    stages = (0, 1, 2, 3) if machine.ranks > 1 else (0,)
    engines: list[dict[str, Any]] = [{"kind": "zero", "zero_stage": stage} for stage in stages]
    engines.append({"kind": "fsdp2", "zero_stage": None})
    for engine in engines:
        for checkpointing in get_args(ActivationCheckpointing):
            changed = config.model_copy(
                update={
                    "engine": config.engine.model_copy(update=engine),
                    "training": config.training.model_copy(
                        update={"activation_checkpointing": checkpointing}
                    ),
                }
            )
            yield memory_plan(changed, ranks=machine.ranks, on_gpu=machine.on_gpu)


def _work(
    config: RunConfig, machine: Machine, arguments: argparse.Namespace, *, time: float
) -> dict[str, Any]:
    """FLOPs and time; what needs the data or a peak that nobody named is None.

    `time` is that of the configured engine over that of stage 0 without recomputation.
    """
    length, batch = config.data.sequence_length, batch_plan(config, machine.ranks)
    flops = flops_per_token(config.model, sequence_length=length).total_flops
    step_tokens = batch.global_batch_size * length
    steps = None
    if config.training.num_epochs is None:
        steps = total_steps(
            config.training,
            epoch_sequences=0,
            global_batch_size=batch.global_batch_size,
            sequence_length=length,
        )
    peak = arguments.peak_tflops
    if peak is None and machine.on_gpu:
        gpu = GPUS[arguments.gpu or "h100"]
        peak = gpu.bf16_tflops if config.training.precision == "bf16" else gpu.fp32_tflops
    mfu = _MFU / time if arguments.mfu is None else arguments.mfu
    step_s = None
    if peak is not None:
        step_s = flops * step_tokens / (machine.ranks * peak * 1e12 * mfu)
    return {
        "parameters": parameter_count(config.model),
        "flops_per_token": flops,
        "tokens_per_step": step_tokens,
        "steps": steps,
        "mfu": mfu,
        "peak_tflops": peak,
        "step_s": step_s,
        "days": None if step_s is None or steps is None else steps * step_s / 86400,
    }


def _time(plan: MemoryPlan) -> float:
    return _ENGINE_TIME[plan.engine] * _CHECKPOINTING_TIME[plan.checkpointing]


def _recommended(machine: Machine, plans: Sequence[MemoryPlan]) -> MemoryPlan | None:
    fitting = [plan for plan in plans if machine.verdict(plan) == "yes"]
    fitting = fitting or [plan for plan in plans if machine.verdict(plan) == "tight"]
    return min(fitting, key=_time, default=None)


def _parts(plan: MemoryPlan) -> dict[str, int]:
    state = plan.state
    return {
        "parameters": state.parameters,
        "gradients": max(state.gradients + state.flattened, state.carried_gradients),
        "optimizer": state.optimizer,
        "buffers": state.buffers + max(state.reduction, state.whole_layers),
        "activations": plan.activations.total,
        "peak": plan.peak,
    }


def _as_json(
    machine: Machine,
    chosen: MemoryPlan,
    plans: Sequence[MemoryPlan],
    work: dict[str, Any],
) -> dict[str, Any]:
    def described(plan: MemoryPlan) -> dict[str, Any]:
        return {
            "engine": plan.engine,
            "activation_checkpointing": plan.checkpointing,
            "fits": machine.verdict(plan),
            "bytes": {**_parts(plan), "certain": plan.certain},
        }

    best = _recommended(machine, plans)
    return {
        **work,
        "machine": machine.name,
        "ranks": machine.ranks,
        "bytes_per_rank": machine.per_rank,
        "configured": described(chosen),
        "recommended": None if best is None else described(best),
        "plans": [described(plan) for plan in plans],
    }


def _print(
    config: RunConfig,
    machine: Machine,
    chosen: MemoryPlan,
    plans: Sequence[MemoryPlan],
    work: dict[str, Any],
) -> None:
    training = config.training
    batch = batch_plan(config, machine.ranks)
    shared = "" if machine.on_gpu or machine.ranks == 1 else f" ({machine.memory / GIB:.1f} in all)"
    print(
        f"{config.model.layer}, {work['parameters']:,} parameters, {training.precision}; "
        f"{machine.ranks} ranks, {machine.name}: {machine.per_rank / GIB:.1f} GiB a rank{shared}\n"
        f"micro-batches of {batch.micro_batch_size} x {config.data.sequence_length:,} tokens, "
        f"{batch.accumulation_steps} of them a step on each rank\n"
    )
    print("GiB a rank, each part at its most; not all of them are there at the same time\n")
    head = f"{'engine':<8}" + "".join(f"{name:>12}" for name in _COLUMNS)
    print(f"{head}  {'checkpointing':<14}{'activations':>12}{'peak':>8}  fits")
    before = ""
    for plan in plans:
        parts = {name: size / GIB for name, size in _parts(plan).items()}
        left = f"{engine_title(plan.engine):<8}" + "".join(f"{parts[n]:>12.2f}" for n in _COLUMNS)
        mark = "  <- configured" if _same(plan, chosen) else ""
        print(
            f"{left if plan.engine != before else ' ' * len(left)}  {plan.checkpointing:<14}"
            f"{parts['activations']:>12.2f}{parts['peak']:>8.2f}  {machine.verdict(plan)}{mark}"
        )
        before = plan.engine
    print()
    _print_work(config, machine, work)
    _print_saves(config, machine, work["parameters"])
    best = _recommended(machine, plans)
    if best is None:
        print("recommended: none fits; take more ranks or a smaller training.micro_batch_size")
        return
    engine = (
        "engine.kind=fsdp2 engine.zero_stage=null"
        if best.engine == "fsdp2"
        else f"engine.zero_stage={best.engine[-1]}"
    )
    print(
        f"recommended, the fastest that fits: {engine} "
        f"training.activation_checkpointing={best.checkpointing}"
    )


def _same(plan: MemoryPlan, chosen: MemoryPlan) -> bool:
    return (plan.engine, plan.checkpointing) == (chosen.engine, chosen.checkpointing)


def _print_work(config: RunConfig, machine: Machine, work: dict[str, Any]) -> None:
    steps, step_s, peak = work["steps"], work["step_s"], work["peak_tflops"]
    length = (
        f"num_epochs {config.training.num_epochs}: steps and days need the data, see "
        "launch/train.py --dry-run"
        if steps is None
        else f"{steps:,} steps, {steps * work['tokens_per_step']:.3e} tokens"
    )
    print(
        f"work: {work['flops_per_token']:,} FLOPs a token, "
        f"{work['tokens_per_step']:,} tokens a step; {length}"
    )
    if step_s is None:
        print("time: name the peak of a rank by --peak-tflops (or --gpu)")
        return
    days = "" if work["days"] is None else f", {work['days']:.1f} days in all"
    print(
        f"time: {step_s:.2f} s a step{days}, at {work['mfu']:.0%} of {peak:g} TFLOP/s on each of "
        f"{machine.ranks} ranks"
    )


def _print_saves(config: RunConfig, machine: Machine, parameters: int) -> None:
    mode = config.checkpoint.save_mode
    share = SAVED_BYTES * parameters / machine.ranks / GIB
    where = "of the host's memory besides, " if machine.on_gpu else "besides, "
    print(
        f"saves: {SAVED_BYTES * parameters / GIB:.1f} GiB on the disk each; "
        + (
            "streaming needs no memory"
            if mode == "streaming"
            else f"{mode} takes {share:.2f} GiB a rank {where}"
            + ("or streams where that is missing" if mode == "auto" else "which must be there")
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/plan.py",
        description="What a run takes of each rank's memory by engine, stage and activation "
        "checkpointing, whether that fits, and how long it takes. Opens no data and builds "
        "nothing. Without a GPU named, for ranks on this host's CPUs.",
    )
    parser.add_argument("--config", required=True, help="YAML or JSON file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="replace fields of the config"
    )
    parser.add_argument("--gpus", type=positive_int, metavar="N", help="ranks, one on each GPU")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="memory and peak of a card; h100")
    parser.add_argument("--gpu-memory", type=_positive, metavar="GIB", help="of each GPU")
    parser.add_argument("--ranks", type=positive_int, metavar="N", help="ranks on CPUs, default 1")
    parser.add_argument(
        "--memory", type=_positive, metavar="GIB", help="for all ranks on CPUs; default: free here"
    )
    parser.add_argument(
        "--peak-tflops", type=_positive, metavar="X", help="of a rank, in place of the card's"
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        metavar="SHARE",
        help="of the peak, for the config as it is; default 0.3 at stage 0 without recomputation, "
        "and less as other stages and recomputation took longer on H100s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than the peak; 0.4 is 40 %")
    return value
