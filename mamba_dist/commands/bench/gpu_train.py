"""bench gpu-train: whole training steps on one GPU, ours beside mamba-ssm's model.

The variants show what each layer costs: mamba-ssm's model in a plain PyTorch loop, our model in the
same loop, and our model in our engine at each ZeRO stage on one rank. Every run is a process of its
own, so that its peak memory is its own, and the processes follow each other. All variants start
from the same weights and take the same batch, so their losses must agree; one whose losses don't
gets no figure.
"""

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, get_args

import torch

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.gpu_profile import profile_tables
from mamba_dist.commands.bench.gpu_step import StepResult, StepSpec
from mamba_dist.commands.bench.gpu_train_report import (
    PEER,
    Runs,
    document,
    heading,
    objections,
    table,
)
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import EngineConfig, RunConfig, TrainingConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import BackendError

OURS: Final = ("plain", "zero-0", "zero-1", "zero-2", "zero-3")
VARIANTS: Final = (PEER, *OURS)
# Variables of a launcher, under which the worker would wait for other ranks.
_LAUNCHER: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID")
_LAST_WORDS: Final = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="the model and its training, see configs/")
    parser.add_argument(
        "--micro-batch", type=positive_int, metavar="B", help="sequences; default the config's"
    )
    parser.add_argument(
        "--length", type=positive_int, metavar="L", help="tokens of each; default the config's"
    )
    parser.add_argument("--steps", type=positive_int, default=12, help="timed; default 12")
    parser.add_argument("--warmup", type=positive_int, default=4, help="before; default 4")
    parser.add_argument(
        "--rounds", type=positive_int, default=1, help="every variant so often, in turns; default 1"
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        help="only these, as mamba-ssm,plain,zero-1",
    )
    parser.add_argument(
        "--backend",
        choices=_choices(EngineConfig, "ops_backend"),
        help="of our ops; default the config's",
    )
    parser.add_argument(
        "--activation-checkpointing",
        choices=_choices(TrainingConfig, "activation_checkpointing"),
        help="of our model; default none, whatever the config says",
        default="none",
    )
    parser.add_argument(
        "--documents", type=positive_int, metavar="N", help="packed in each row; ours only"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--profile", metavar="VARIANT", help="also say where this one's time goes, by kernel"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong between arguments."""
    asked = arguments.variants or ()
    unknown = sorted({*asked, *([arguments.profile] if arguments.profile else [])} - set(VARIANTS))
    if unknown:
        return f"{', '.join(unknown)} unknown here, expected variants of {', '.join(VARIANTS)}"
    if arguments.profile and asked and arguments.profile not in asked:
        return f"--profile {arguments.profile} is not among --variants"
    if arguments.device == "cpu" and arguments.profile:
        return "--profile reads a GPU's kernels; leave it out with --device cpu"
    if arguments.device == "cpu" and PEER in asked:
        return f"{PEER} runs on a GPU only; leave it out with --device cpu"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Whether every variant could be measured and is right; prints tables, and writes --json.

    Raises:
        BackendError: there is no such device.
        ConfigError: the config, or what an argument changes in it, is wrong.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda: torch sees no GPU here; --device cpu tries the tool out")
    specs = _specs(arguments)
    print(heading(words), flush=True)
    runs: list[Mapping[str, StepResult | str]] = []
    try:
        for number in range(1, arguments.rounds + 1):
            found: dict[str, StepResult | str] = {}
            runs.append(found)
            for name, spec in specs.items():
                print(f"[round {number}/{arguments.rounds}] {name}", file=sys.stderr)
                found[name] = _run_process(spec, on_cpu=arguments.device == "cpu")
    finally:
        measured = Runs(specs, runs)
        print(table(measured), flush=True)
        _print_profile(measured)
        if arguments.json is not None:
            content = document(words, measured)
            write_text(json.dumps(content, indent=2) + "\n", arguments.json)
    return not objections(measured)


def _specs(arguments: argparse.Namespace) -> dict[str, StepSpec]:
    config = _config(arguments)
    names = arguments.variants or (OURS if arguments.device == "cpu" else VARIANTS)
    if arguments.profile and not arguments.variants:
        names = (arguments.profile,)
    return {
        name: StepSpec(
            variant=name,
            config=config,
            batch=arguments.micro_batch or config.training.micro_batch_size,
            length=arguments.length or config.data.sequence_length,
            # Their models take no documents.
            documents=None if name == PEER else arguments.documents,
            warmup=arguments.warmup,
            steps=arguments.steps,
            profile=name == arguments.profile,
        )
        for name in names
    }


def _config(arguments: argparse.Namespace) -> RunConfig:
    checkpointing = arguments.activation_checkpointing
    overrides = [f"training.activation_checkpointing={checkpointing}"]
    if arguments.backend is not None:
        overrides.append(f"engine.ops_backend={arguments.backend}")
    return load_config(arguments.config, overrides).config


def _choices(section: type[EngineConfig] | type[TrainingConfig], field: str) -> tuple[str, ...]:
    """The values that the config's schema allows for a field."""
    return get_args(section.model_fields[field].annotation)


def _run_process(spec: StepSpec, *, on_cpu: bool) -> StepResult | str:
    """What a process of its own has found, or why it found nothing."""
    module = "peers_mamba_ssm" if spec.variant == PEER else "gpu_variants"
    hidden = ["CUDA_VISIBLE_DEVICES="] if on_cpu else []
    unset = [part for name in _LAUNCHER for part in ("-u", name)]
    with TemporaryDirectory() as folder:
        answer_path = Path(folder, "answer")
        worker = [sys.executable, "-m", f"{__package__}.{module}", str(answer_path)]
        process = subprocess.run(
            ["env", *unset, *hidden, *worker],
            input=pickle.dumps(spec),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        answer = answer_path.read_bytes() if answer_path.exists() else None
    said = process.stdout.decode(errors="replace")
    if answer is None:
        last = [line.strip() for line in said.split("\n") if line.strip()][-_LAST_WORDS:]
        return " / ".join([f"its process ended with {process.returncode}", *last])
    good, result = pickle.loads(answer)
    if not good:
        print(said, file=sys.stderr)
    found: StepResult | str = result
    return found


def _print_profile(measured: Runs) -> None:
    for name in measured.specs:
        for result in measured.results(name):
            if result.profile is not None:
                print(profile_tables(name, result.profile), flush=True)
