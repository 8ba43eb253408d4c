"""bench gpu-train: whole training steps on one GPU, ours beside mamba-ssm's model.

The variants show what each layer costs: mamba-ssm's model in a plain PyTorch loop, our model in the
same loop, and our model in our engine. On one GPU training runs ZeRO stage 0, so the other stages
are measured only if they are asked for: as each of several ranks runs them, without the
communication. Every run is a process of its own, so that its peak memory is its own, and the
variants take turns. All variants start from the same weights and take the same batch, so their
losses must agree; one whose losses don't gets no figure.
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
from mamba_dist.commands.bench.gpu.arguments import Option, in_full, names
from mamba_dist.commands.bench.gpu.peer_model import training_refusal
from mamba_dist.commands.bench.gpu.profile import profile_tables
from mamba_dist.commands.bench.gpu.step import StepResult, StepSpec
from mamba_dist.commands.bench.gpu.train_report import (
    PEER,
    Runs,
    brief,
    document,
    heading,
    objections,
    table,
)
from mamba_dist.config.engine import EngineConfig
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import RunConfig, TrainingConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import BackendError, ConfigError

VARIANTS: Final = (PEER, "plain", "zero-0", "zero-1", "zero-2", "zero-3", "fsdp2")
_DEFAULTS: Final = (PEER, "plain", "zero-0")
# Variables of a launcher, under which the worker would wait for other ranks, or at their address.
_LAUNCHER: Final = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_STEP_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAST_WORDS: Final = 3
# Compiling and tuning every kernel of a large model, and then some.
_TIMEOUT_S: Final = 1800


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="the model and its training, see configs/")
    parser.add_argument(
        "--micro-batch", type=positive_int, metavar="B", help="sequences; default the config's"
    )
    parser.add_argument(
        "--length", type=positive_int, metavar="L", help="tokens of each; default the config's"
    )
    parser.add_argument(
        "--accumulation-steps",
        type=positive_int,
        default=1,
        metavar="N",
        help="micro-batches of a step; default 1",
    )
    parser.add_argument("--steps", type=positive_int, default=12, help="timed; default 12")
    parser.add_argument("--warmup", type=positive_int, default=4, help="before; default 4")
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="every variant so often, in turns; default 3"
    )
    parser.add_argument(
        "--variants",
        type=names,
        help=f"of {', '.join(VARIANTS)}; default {', '.join(_DEFAULTS)}; zero-1 to zero-3 are as "
        "each of several ranks runs them, without the communication",
    )
    parser.add_argument(
        "--timeout",
        type=positive_int,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"for one process of a variant; default {_TIMEOUT_S}",
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
        ConfigError: the config, or what an argument makes of it, is wrong.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda: torch sees no GPU here; --device cpu tries the tool out")
    specs = _specs(arguments)
    full = in_full("gpu-train", _options(arguments, specs))
    print(heading(words, full), flush=True)
    runs: list[dict[str, StepResult | str]] = []
    measured = Runs(specs, runs)
    try:
        for number in range(1, arguments.rounds + 1):
            runs.append({})
            for name, spec in specs.items():
                if any(isinstance(r.get(name), str) for r in runs):
                    # It has failed and gets no figure.
                    continue
                print(f"[round {number}/{arguments.rounds}] {name}", file=sys.stderr, flush=True)
                found = runs[-1][name] = _run_process(
                    spec, on_cpu=arguments.device == "cpu", timeout_s=arguments.timeout
                )
                # At once, so that a run that is stopped has said what it found.
                print(f"  {brief(found)}", file=sys.stderr, flush=True)
    finally:
        print(table(measured), flush=True)
        _print_profile(measured)
        if arguments.json is not None:
            content = document(words, full, measured)
            write_text(json.dumps(content, indent=2) + "\n", arguments.json)
    return not objections(measured)


def _specs(arguments: argparse.Namespace) -> dict[str, StepSpec]:
    config = _config(arguments)
    length = arguments.length or config.data.sequence_length
    if arguments.documents is not None and arguments.documents > length:
        raise ConfigError(
            f"--documents {arguments.documents} do not fit into a row of {length} tokens, expected "
            "at most one a token; take fewer, or a larger --length"
        )
    return {
        name: StepSpec(
            variant=name,
            config=config,
            batch=arguments.micro_batch or config.training.micro_batch_size,
            accumulation=arguments.accumulation_steps,
            length=length,
            # Their models take no documents.
            documents=None if name == PEER else arguments.documents,
            warmup=arguments.warmup,
            steps=arguments.steps,
            profile=name == arguments.profile,
        )
        for name in _asked(arguments, config)
    }


def _asked(arguments: argparse.Namespace, config: RunConfig) -> Sequence[str]:
    """The variants to measure."""
    if arguments.variants is not None:
        asked: Sequence[str] = arguments.variants
        return asked
    if arguments.profile is not None:
        return (arguments.profile,)
    refusal = f"{PEER} runs on a GPU only" if arguments.device == "cpu" else None
    refusal = refusal or training_refusal(config)
    if refusal is None:
        return _DEFAULTS
    print(f"{PEER} is left out: {refusal}", file=sys.stderr)
    return [name for name in _DEFAULTS if name != PEER]


def _options(arguments: argparse.Namespace, specs: Mapping[str, StepSpec]) -> list[Option]:
    """Everything that is in force, as the config and the device have decided it."""
    spec = next(iter(specs.values()))
    return [
        ("--config", arguments.config),
        ("--micro-batch", spec.batch),
        ("--length", spec.length),
        ("--accumulation-steps", spec.accumulation),
        ("--steps", spec.steps),
        ("--warmup", spec.warmup),
        ("--rounds", arguments.rounds),
        ("--variants", ",".join(specs)),
        ("--timeout", arguments.timeout),
        ("--backend", spec.config.engine.ops_backend),
        ("--activation-checkpointing", spec.config.training.activation_checkpointing),
        ("--documents", arguments.documents),
        ("--device", arguments.device),
        ("--profile", arguments.profile),
        ("--json", arguments.json),
    ]


def _config(arguments: argparse.Namespace) -> RunConfig:
    checkpointing = arguments.activation_checkpointing
    overrides = [f"training.activation_checkpointing={checkpointing}"]
    if arguments.backend is not None:
        overrides.append(f"engine.ops_backend={arguments.backend}")
    return load_config(arguments.config, overrides).config


def _choices(section: type[EngineConfig] | type[TrainingConfig], field: str) -> tuple[str, ...]:
    """The values that the config's schema allows for a field."""
    return get_args(section.model_fields[field].annotation)


def _run_process(spec: StepSpec, *, on_cpu: bool, timeout_s: float) -> StepResult | str:
    """What a process of its own has found, or why it found nothing."""
    module = "variants_mamba_ssm" if spec.variant == PEER else "variants"
    hidden = ["CUDA_VISIBLE_DEVICES="] if on_cpu else []
    unset = [part for name in _LAUNCHER for part in ("-u", name)]
    with TemporaryDirectory() as folder:
        answer_path = Path(folder, "answer")
        worker = [sys.executable, "-m", f"{__package__}.{module}", str(answer_path)]
        try:
            process = subprocess.run(
                ["env", *unset, *hidden, *worker],
                input=pickle.dumps(spec),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            reason = f"it did not end within --timeout {timeout_s:g} seconds and was killed"
            return _with_last_words(reason, error.stdout)
        answer = answer_path.read_bytes() if answer_path.exists() else None
    if answer is None:
        return _with_last_words(f"its process ended with {process.returncode}", process.stdout)
    good, result = pickle.loads(answer)
    if not good:
        print(process.stdout.decode(errors="replace"), file=sys.stderr)
    found: StepResult | str = result
    return found


def _with_last_words(reason: str, said: bytes | None) -> str:
    """A line of the reason and of the last ones that a process has printed."""
    lines = (said or b"").decode(errors="replace").split("\n")
    return " / ".join([reason, *[line.strip() for line in lines if line.strip()][-_LAST_WORDS:]])


def _print_profile(measured: Runs) -> None:
    for name in measured.specs:
        for result in measured.results(name):
            if result.profile is not None:
                print(profile_tables(name, result.profile), flush=True)
