"""bench gpu-decode: greedy decoding on one GPU, ours as CUDA graph and eager, beside mamba-ssm's.

All variants have the same model, weights and bf16 matrices, run in this process and take turns.
Time per token is that of all new tokens after the first, so that reading the prompt does not count;
all texts of a batch have the same one. No text ends early. A variant that writes something else
than the model would gets no figure; one that fails says so, and the others go on.

B texts, L tokens of the prompt, K new tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import torch

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.gpu.arguments import Option, in_full, names
from mamba_dist.commands.bench.gpu.clock import clock_of, copy_bytes_per_s
from mamba_dist.commands.bench.gpu.decode_models import PEER, Decode, Models, Shape
from mamba_dist.commands.bench.gpu.decode_report import Decoded, records, table
from mamba_dist.commands.bench.gpu.failures import Attempts, Failure
from mamba_dist.commands.bench.gpu.ops_report import heading
from mamba_dist.commands.bench.gpu.peer_model import shape_refusal
from mamba_dist.commands.bench.spec import NotMeasuredError
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import MambaConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import BackendError

_Answer = TypeVar("_Answer")

# Last the one whose failure could take the device's random generators from the others.
_VARIANTS: Final = ("eager", PEER, "graph")
# On a CPU there is nothing to capture and no kernel of the peer: it tries the tool out.
_CPU_VARIANTS: Final = ("eager",)
# Of a turn in which something else disturbed the first token.
_TRIES: Final = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="of a run, for its model section")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 64], metavar="B")
    parser.add_argument("--prompt", type=positive_int, default=128, metavar="L", help="default 128")
    parser.add_argument(
        "--new-tokens", type=positive_int, default=256, metavar="K", help="default 256"
    )
    parser.add_argument(
        "--variants",
        type=names,
        help=f"these, as graph,{PEER}; default all that the device and the model allow",
    )
    parser.add_argument("--backend", default="auto", help="of our ops; default auto")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def problem(arguments: argparse.Namespace) -> str | None:
    """What is wrong between arguments."""
    unknown = sorted(set(arguments.variants or ()) - set(_VARIANTS))
    if unknown:
        return f"--variants: {', '.join(unknown)} unknown here, expected {', '.join(_VARIANTS)}"
    if arguments.new_tokens < 2:
        return "--new-tokens 1: the first token comes with the prompt, expected at least 2"
    return None


def run(words: Sequence[str], arguments: argparse.Namespace) -> bool:
    """Whether every variant could be measured and is right; prints tables, and writes --json.

    Raises:
        ConfigError: the config is wrong.
        BackendError: there is no such device or ops backend.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda: torch sees no GPU here; --device cpu tries the tool out")
    config = load_config(arguments.config).config.model
    device = torch.device(arguments.device)
    copy = copy_bytes_per_s(clock_of(device), device)
    asked = arguments.variants or _default_variants(config, device)
    models = Models(config, arguments.backend, device)
    full = in_full("gpu-decode", _options(arguments, asked, models.backend))
    print(heading(words, full, device, copy), flush=True)
    attempts = Attempts(device)
    found: list[Decoded] = []
    try:
        for number, batch in enumerate(arguments.batch, 1):
            shape = Shape(batch, arguments.prompt, arguments.new_tokens)
            print(f"[{number}/{len(arguments.batch)}] {shape}", file=sys.stderr)
            found.append(Decoded(shape, asked))
            _Session(found[-1], models, attempts).measure(arguments.rounds)
            print(table(found[-1], models, copy), flush=True)
    finally:
        if arguments.json is not None:
            content = {
                "command": list(words),
                "command_in_full": full,
                "copy_bytes_per_s": copy,
                "weight_bytes": models.weight_bytes,
                "backend": models.backend,
                "records": [r for decoded in found for r in records(decoded, models, copy)],
            }
            write_text(json.dumps(content, indent=2) + "\n", arguments.json)
    return all(decoded.is_right for decoded in found)


def _default_variants(config: MambaConfig, device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return _CPU_VARIANTS
    refusal = shape_refusal(config)
    if refusal is None:
        return _VARIANTS
    print(f"{PEER} is left out: {refusal}", file=sys.stderr)
    return tuple(name for name in _VARIANTS if name != PEER)


def _options(arguments: argparse.Namespace, variants: Sequence[str], backend: str) -> list[Option]:
    """Everything that is in force."""
    return [
        ("--config", arguments.config),
        ("--batch", arguments.batch),
        ("--prompt", arguments.prompt),
        ("--new-tokens", arguments.new_tokens),
        ("--variants", ",".join(variants)),
        ("--backend", backend),
        ("--device", arguments.device),
        ("--rounds", arguments.rounds),
        ("--json", arguments.json),
    ]


class _Session:
    """The variants of one shape that still run; what they show is added to `found`."""

    def __init__(self, found: Decoded, models: Models, attempts: Attempts) -> None:
        self._found = found
        self._models = models
        self._attempts = attempts
        self._judges = {variant: models.judge(variant, found.shape) for variant in found.asked}
        self._running: dict[str, Decode] = {}
        self._first_text: list[int] | None = None

    def measure(self, rounds: int) -> None:
        """Warms every variant that can run here, then lets them take turns."""
        for variant in self._found.asked:
            self._told(variant, partial(self._warm, variant))
        for _ in range(rounds if self._running else 0):
            if self._found.rounds and self._attempts.lost is not None:
                # What has been measured stands; another turn could only fail.
                break
            turns: dict[str, float] = {}
            self._found.rounds.append(turns)
            for variant, decode in list(self._running.items()):
                if self._attempts.lost is not None and variant in self._found.rounds[0]:
                    continue
                token_s = self._told(variant, partial(self._turn, variant, decode))
                if token_s is not None:
                    turns[variant] = token_s

    def _warm(self, variant: str) -> None:
        shape = self._found.shape
        decode = self._models.decode(variant, shape)
        texts = decode(shape.new_tokens)
        self._judged(variant, texts, shape.new_tokens)
        self._running[variant] = decode
        self._first_text = self._first_text or texts[0]
        self._found.agreement[variant] = _common_tokens(self._first_text, texts[0])

    def _turn(self, variant: str, decode: Decode) -> float:
        count = self._found.shape.new_tokens
        for _ in range(_TRIES):
            token_s, first_tokens, texts = timed(decode, count)
            self._judged(variant, first_tokens, 1)
            self._judged(variant, texts, count)
            if token_s > 0:
                return token_s
        raise NotMeasuredError(
            f"{count} tokens took less time than the first one alone, {_TRIES} times; something "
            "else is running, or --new-tokens are too few"
        )

    def _judged(self, variant: str, texts: list[list[int]], new_tokens: int) -> None:
        reason = self._judges[variant].objection(texts, new_tokens)
        if reason is not None:
            self._found.wrong[variant] = reason
            raise NotMeasuredError(reason)

    def _told(self, variant: str, call: Callable[[], _Answer]) -> _Answer | None:
        """What the call returns; None if it failed, which ends the variant."""
        answer = self._attempts.told(f"{variant} at {self._found.shape}", call)
        if isinstance(answer, Failure):
            if variant not in self._found.wrong:
                self._found.absent[variant] = answer.reason
            self._running.pop(variant, None)
            return None
        return answer


def timed(decode: Decode, new_tokens: int) -> tuple[float, list[list[int]], list[list[int]]]:
    """Seconds of each token after the first, and the texts (B, 1) and (B, K) of the two calls.

    Both calls end with the tokens on the host. A disturbed first call makes less than nothing of
    the others.
    """
    begin = time.perf_counter()
    first_tokens = decode(1)
    first = time.perf_counter()
    texts = decode(new_tokens)
    end = time.perf_counter()
    return ((end - first) - (first - begin)) / (new_tokens - 1), first_tokens, texts


def _common_tokens(text: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(text, other, strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(text))
