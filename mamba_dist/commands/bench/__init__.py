"""tools/bench.py: how fast the kernels and whole models are beside other implementations.

Every figure is a ratio between things measured in the same run: each variant has a process of its
own, they take turns, and rounds in which the machine was busy with something else do not count.
A variant whose results are wrong gets no figure. On a GPU one process is enough: see `gpu`.

Exit codes: 0 done; 1 a variant's results are wrong, or a table has no figures; 2 a mistake that the
message explains; 130 interrupted, after writing what was measured; anything else is a crash.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench import checkpoint, data, data_large, ops, train
from mamba_dist.commands.bench.child import ChildWorker
from mamba_dist.commands.bench.gpu import decode as gpu_decode
from mamba_dist.commands.bench.gpu import ops as gpu_ops
from mamba_dist.commands.bench.gpu import train as gpu_train
from mamba_dist.commands.bench.measure import Plan, run_in_turns
from mamba_dist.commands.bench.report import Figures, figures, records, table
from mamba_dist.commands.bench.spec import DTYPES, Allocator, Group
from mamba_dist.commands.bench_read import run as reading
from mamba_dist.commands.machine import package_version, this_machine
from mamba_dist.config.text import write_text
from mamba_dist.errors import MambaDistError

EXIT_WRONG = 1
EXIT_INTERRUPTED = 130
EXIT_USER_ERROR = 2
_ALLOCATORS: Final[dict[str, tuple[Allocator, ...]]] = {
    "default": ("default",),
    "tuned": ("tuned",),
    "both": ("default", "tuned"),
}
_PACKAGES: Final = ("torch", "transformers", "mambapy")
# Benchmarks with a report of their own.
_OTHERS: Final = {
    "data": data,
    "data-large": data_large,
    "data-read": reading,
    "checkpoint": checkpoint,
    "gpu-ops": gpu_ops,
    "gpu-decode": gpu_decode,
    "gpu-train": gpu_train,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`; the tables go to stdout."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments = parser.parse_args(words)
    problem = _problem(arguments)
    if problem:
        parser.error(problem)
    found: list[Figures] = []
    try:
        if (other := _OTHERS.get(arguments.command)) is not None:
            return 0 if other.run(words, arguments) else EXIT_WRONG
        interrupted = _measure_all(words, arguments, found)
        if arguments.json is not None:
            write_text(
                json.dumps(_document(words, found, arguments), indent=2) + "\n", arguments.json
            )
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_WRONG if any(f.result.wrong or f.is_empty for f in found) else 0


def _measure_all(words: Sequence[str], arguments: argparse.Namespace, found: list[Figures]) -> bool:
    """Prints and adds each group's figures; whether the user has stopped it."""
    groups = _groups(arguments)
    print(_heading(words, arguments.threads), flush=True)
    try:
        for number, group in enumerate(groups, 1):
            print(f"[{number}/{len(groups)}] {group.title}", file=sys.stderr)
            found.append(_measured(group, arguments, share=1 / len(groups)))
            print(table(found[-1]), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: {len(found)} of {len(groups)} tables are done", file=sys.stderr)
        return True
    return False


def _measured(group: Group, arguments: argparse.Namespace, *, share: float) -> Figures:
    plan = Plan(arguments.seconds * share, arguments.max_other_load)
    workers = {
        name: ChildWorker(spec, threads=arguments.threads, allocator=group.allocator)
        for name, spec in group.specs.items()
    }
    return figures(group, run_in_turns(workers, plan))


def _groups(arguments: argparse.Namespace) -> list[Group]:
    dtypes = list(DTYPES.values()) if arguments.dtype == "both" else [DTYPES[arguments.dtype]]
    allocators = _ALLOCATORS[arguments.allocator]
    if arguments.command == "ops":
        return ops.groups(
            arguments.op or tuple(ops.VARIANTS),
            shape=arguments.shape,
            dtypes=dtypes,
            allocators=allocators,
            only=arguments.variants,
        )
    preset = train.PRESETS[arguments.preset]
    changes: dict[str, Any] = {
        field: value
        for field in ("d_model", "n_layers", "vocab_size", "batch")
        if (value := getattr(arguments, field)) is not None
    }
    if arguments.length is not None:
        changes["lengths"] = tuple(arguments.length)
    return train.groups(
        arguments.preset + (" changed" if changes else ""),
        replace(preset, **changes),
        arguments.layer,
        optimizer=arguments.optimizer,
        dtypes=dtypes,
        allocators=allocators,
        only=arguments.variants,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench.py",
        description="Measure kernels or training steps beside other implementations, in turns; "
        "prints Markdown. The others come with pip install mambapy transformers.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = _common_arguments()
    of_ops = commands.add_parser(
        "ops", parents=[common], help="scan, convolution and SSD, forward and backward"
    )
    of_ops.add_argument("--op", action="append", choices=tuple(ops.VARIANTS), help="only this one")
    of_ops.add_argument(
        "--shape", type=_numbers, help="for one --op: its sizes, as 1,2048,1536,16 for scan"
    )
    of_train = commands.add_parser(
        "train", parents=[common], help="training steps of whole language models"
    )
    of_train.add_argument("--preset", choices=tuple(train.PRESETS), default="small")
    of_train.add_argument("--layer", choices=tuple(train.VARIANTS), default="mamba1")
    of_train.add_argument(
        "--optimizer", action="store_true", help="AdamW's update belongs to the step"
    )
    for option, name in (
        ("--d-model", "d_model"),
        ("--layers", "n_layers"),
        ("--vocab", "vocab_size"),
        ("--batch", "batch"),
    ):
        of_train.add_argument(
            option, dest=name, type=positive_int, metavar="N", help="instead of the preset's"
        )
    of_train.add_argument(
        "--length", type=_numbers, help="instead of the preset's, or several as 512,1024"
    )
    data.add_arguments(
        commands.add_parser("data", help="tokenising, beside the libraries alone and other ways")
    )
    data_large.add_arguments(
        commands.add_parser("data-large", help="the memory of tokenising a corpus of any size")
    )
    reading.add_arguments(
        commands.add_parser("data-read", help="opening and reading token files, ours and others'")
    )
    checkpoint.add_arguments(
        commands.add_parser("checkpoint", help="what saving costs training, beside the disk alone")
    )
    gpu_decode.add_arguments(
        commands.add_parser("gpu-decode", help="tokens per second of greedy decoding on one GPU")
    )
    gpu_train.add_arguments(
        commands.add_parser("gpu-train", help="training steps on one GPU, ours beside mamba-ssm's")
    )
    gpu_ops.add_arguments(
        commands.add_parser("gpu-ops", help="kernels on one GPU beside mamba-ssm's, and precision"),
        sizes=_numbers,
        seconds=_positive,
    )
    return parser


def _common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=positive_int, default=2, help="default 2")
    common.add_argument("--dtype", choices=(*DTYPES, "both"), default="fp32")
    common.add_argument(
        "--allocator",
        choices=tuple(_ALLOCATORS),
        default="both",
        help="tuned tells glibc's malloc to keep freed memory; default both, a table each",
    )
    common.add_argument(
        "--variants", type=lambda text: tuple(text.split(",")), help="only these, as cpu,torch"
    )
    common.add_argument(
        "--seconds",
        type=_positive,
        default=240.0,
        help="for all tables together, start-up not counted; default 240; 3 rounds at least",
    )
    common.add_argument(
        "--max-other-load",
        type=_positive,
        default=0.15,
        help="cores that other processes may take during a turn; default 0.15",
    )
    common.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    return common


def _problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the machine or between arguments."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        return f"--json: folder {arguments.json.parent} does not exist"
    if arguments.json is not None and arguments.json.is_dir():
        return f"--json: {arguments.json} is a folder, expected a file to write"
    if (other := _OTHERS.get(arguments.command)) is not None:
        found: str | None = other.problem(arguments)
        return found
    if not Path("/proc/stat").exists():
        return "runs on Linux only: load and memory are read from /proc"
    if arguments.command == "ops":
        names = arguments.op or tuple(ops.VARIANTS)
        known = {variant for name in names for variant in ops.VARIANTS[name]}
        if arguments.shape:
            if len(names) != 1:
                return "--shape goes with exactly one --op"
            letters = ops.shape_letters(names[0])
            if len(letters) != len(arguments.shape):
                return f"--shape: {names[0]} has the sizes {','.join(letters)}"
    else:
        known = set(train.VARIANTS[arguments.layer])
    unknown = sorted(set(arguments.variants or ()) - known)
    if unknown:
        return f"--variants: {', '.join(unknown)} unknown here, expected {', '.join(sorted(known))}"
    return None


def _numbers(text: str) -> list[int]:
    try:
        return [positive_int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not numbers with commas between") from None


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in _PACKAGES}


def _heading(words: Sequence[str], threads: int) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in _versions().items() if v is not None)
    return (
        f"Machine: {this_machine()}; {versions}; {threads} threads; {datetime.date.today()}.\n"
        f"Command: `tools/bench.py {' '.join(words)}`\n"
    )


def _document(
    words: Sequence[str], found: Sequence[Figures], arguments: argparse.Namespace
) -> dict[str, Any]:
    return {
        "command": list(words),
        "date": str(datetime.date.today()),
        "machine": asdict(this_machine()),
        "versions": _versions(),
        "threads": arguments.threads,
        "records": [record for figure in found for record in records(figure)],
    }
