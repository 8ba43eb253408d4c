"""bench gpu-decode: greedy decoding on one GPU, ours as CUDA graph and eager, beside mamba-ssm's.

All variants have the same model, weights and bf16 matrices, run in this process and take turns.
Time per token is that of all new tokens after the first, so that reading the prompt does not count;
all texts of a batch have the same one. No text ends early.

B texts, L tokens of the prompt, K new tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from mamba_dist.commands.arguments import positive_int
from mamba_dist.commands.bench.gpu_clock import clock_of, copy_bytes_per_s
from mamba_dist.commands.bench.gpu_report import heading
from mamba_dist.commands.bench.measure import Spread
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import MambaConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import BackendError
from mamba_dist.inference.generate import GenerationSettings, generate
from mamba_dist.inference.graph import DecodingSteps
from mamba_dist.inference.precision import round_matrices
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.ops.cuda_packages import mamba_lm_head_model

Decode = Callable[[int], list[list[int]]]
"""From a number of tokens K to the new tokens (B, K) of each text."""

_PEER: Final = "mamba-ssm"
# Last the one whose failure could take the device's random generators from the others.
_VARIANTS: Final = ("eager", _PEER, "graph")
# On a CPU there is nothing to capture and no kernel of the peer: it tries the tool out.
_CPU_VARIANTS: Final = ("eager",)


@dataclass(frozen=True)
class Shape:
    """B texts that grow by K tokens after L."""

    batch: int
    prompt: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens"


@dataclass(frozen=True)
class Decoded:
    """The variants of one shape.

    rounds: seconds per token, each with one turn of every variant that could run.
    absent: variants without figures and why.
    agreement: how many tokens a text has before the first one that differs from the first
        variant's; equal weights and other roundings part sooner or later.
    """

    shape: Shape
    rounds: Sequence[Mapping[str, float]]
    absent: Mapping[str, str]
    agreement: Mapping[str, int]

    def seconds(self, variant: str) -> Spread:
        """Per token of all texts."""
        return _spread([turns[variant] for turns in self.rounds])

    def speed_over_peer(self, variant: str) -> Spread | None:
        """How many times as fast as mamba-ssm, within rounds; None if that has no figures."""
        if _PEER in self.absent or _PEER not in self.agreement:
            return None
        return _spread([turns[_PEER] / turns[variant] for turns in self.rounds])


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
        type=lambda text: tuple(text.split(",")),
        help=f"these, as graph,{_PEER}; default all that the device can run",
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
    """Whether every variant could be measured; prints tables, and writes --json.

    Raises:
        ConfigError: the config is wrong.
        BackendError: there is no such device or ops backend.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda: torch sees no GPU here; --device cpu tries the tool out")
    config = load_config(arguments.config).config.model
    device = torch.device(arguments.device)
    copy = copy_bytes_per_s(clock_of(device), device)
    print(heading(words, device, copy), flush=True)
    asked = arguments.variants or (_VARIANTS if device.type == "cuda" else _CPU_VARIANTS)
    models = _Models(config, arguments.backend, device)
    found: list[Decoded] = []
    for number, batch in enumerate(arguments.batch, 1):
        shape = Shape(batch, arguments.prompt, arguments.new_tokens)
        print(f"[{number}/{len(arguments.batch)}] {shape}", file=sys.stderr)
        found.append(_measure(models, shape, asked, rounds=arguments.rounds))
        print(_table(found[-1], models, copy), flush=True)
    if arguments.json is not None:
        content = {
            "command": list(words),
            "copy_bytes_per_s": copy,
            "weight_bytes": models.weight_bytes,
            "backend": models.backend,
            "records": [r for decoded in found for r in _records(decoded, models, copy)],
        }
        write_text(json.dumps(content, indent=2) + "\n", arguments.json)
    return not any(decoded.absent for decoded in found)


class _Models:
    """Our model and, once it is asked for, mamba-ssm's with the same weights."""

    def __init__(self, config: MambaConfig, backend: str, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._theirs: Any = None
        self.backend = resolve_backend(backend, device_type=device.type)
        with device:
            ours = MambaLM(config, backend=self.backend).eval()
        initialize(ours, config, seed=0, gather=lambda _: nullcontext())
        self._ours = round_matrices(ours)

    @property
    def weight_bytes(self) -> int:
        """What every token has to read: all parameters, but one row only of an untied embedding."""
        parameters = [
            parameter
            for name, parameter in self._ours.named_parameters()
            if self._config.tie_embeddings or name != "backbone.embedding.weight"
        ]
        return sum(p.numel() * p.element_size() for p in parameters)

    @torch.no_grad()
    def state_bytes(self, batch: int) -> int:
        """The states of our layers for `batch` texts."""
        _, states = self._ours.forward_with_state(
            torch.zeros(1, 1, dtype=torch.int64).to(self._device)
        )
        return batch * sum(s.conv.nbytes + s.ssm.nbytes for s in states)

    def decode(self, variant: str, shape: Shape) -> Decode:
        """The variant, ready to run.

        Raises:
            BackendError: the peer cannot be imported.
        """
        draw = torch.Generator().manual_seed(7)
        prompt = torch.randint(0, self._config.vocab_size, (shape.prompt,), generator=draw)
        prompts = prompt.expand(shape.batch, -1)
        if variant != _PEER:
            steps = DecodingSteps(self._ours) if variant == "graph" else None
            return partial(_ours, self._ours, prompts.tolist(), steps)
        if self._theirs is None:
            self._theirs = _their_model(self._config, self._ours, self._device)
        # Their cache takes one batch for a part of another.
        self._theirs._decoding_cache = None
        inputs = prompts.contiguous().to(self._device)
        return partial(_theirs, self._theirs, inputs, self._config.vocab_size)


def _ours(
    model: MambaLM, prompts: list[list[int]], steps: DecodingSteps | None, count: int
) -> list[list[int]]:
    settings = GenerationSettings(
        count, sampling=SamplingSettings(temperature=0.0), graph=steps is not None
    )
    return generate(model, prompts, settings, steps=steps)


def _theirs(model: Any, prompts: Tensor, vocab_size: int, count: int) -> list[list[int]]:
    texts = model.generate(
        input_ids=prompts,
        max_length=prompts.shape[1] + count,
        top_k=1,
        cg=True,
        vocab_size=vocab_size,
    )
    new_tokens: list[list[int]] = texts[:, prompts.shape[1] :].tolist()
    return new_tokens


def _their_model(config: MambaConfig, ours: MambaLM, device: torch.device) -> Any:
    """mamba-ssm's language model in bf16, of our shape and with our weights."""
    make_model, make_config = mamba_lm_head_model()
    mixer: dict[str, Any] = {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "conv_bias": config.conv_bias,
        "bias": config.proj_bias,
    }
    if config.layer == "mamba1":
        mixer |= {"layer": "Mamba1", "dt_rank": config.resolved_dt_rank}
    else:
        mixer |= {
            "layer": "Mamba2",
            "headdim": config.headdim,
            "ngroups": config.ngroups,
            "chunk_size": config.chunk_size,
        }
    shape = make_config(
        d_model=config.d_model,
        n_layer=config.n_layers,
        vocab_size=config.padded_vocab_size,
        pad_vocab_size_multiple=1,
        ssm_cfg=mixer,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        tie_embeddings=config.tie_embeddings,
    )
    model: nn.Module = make_model(shape, device=device, dtype=torch.bfloat16).eval()
    left = model.load_state_dict(dict(ours.named_parameters()), strict=False)
    assert left.missing_keys == (["lm_head.weight"] if config.tie_embeddings else []), left
    assert not left.unexpected_keys, left
    return model


def _measure(models: _Models, shape: Shape, asked: Sequence[str], *, rounds: int) -> Decoded:
    """Warms every variant that can run here, then lets them take turns."""
    running: dict[str, Decode] = {}
    texts: dict[str, list[int]] = {}
    absent: dict[str, str] = {}
    for variant in asked:
        try:
            decode = models.decode(variant, shape)
            texts[variant] = decode(shape.new_tokens)[0]
            running[variant] = decode
        # A peer, or a kernel of ours on a device that nobody has tried, fails in whatever way.
        except Exception as error:
            absent[variant] = f"{type(error).__name__}: {error}"
    first = next(iter(texts.values()), [])
    return Decoded(
        shape,
        [
            {name: _token_s(decode, shape.new_tokens) for name, decode in running.items()}
            for _ in range(rounds if running else 0)
        ],
        absent,
        {variant: _common_tokens(first, text) for variant, text in texts.items()},
    )


def _token_s(decode: Decode, new_tokens: int) -> float:
    """Seconds of each token after the first; both calls end with the tokens on the host."""
    times = [time.perf_counter()]
    for count in (1, new_tokens):
        decode(count)
        times.append(time.perf_counter())
    begin, first, end = times
    return ((end - first) - (first - begin)) / (new_tokens - 1)


def _common_tokens(text: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(text, other, strict=True)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(text))


def _records(found: Decoded, models: _Models, copy: float) -> list[dict[str, Any]]:
    bound_s = models.weight_bytes / copy
    records: list[dict[str, Any]] = []
    for variant in found.agreement:
        token_s, over = found.seconds(variant), found.speed_over_peer(variant)
        records.append(
            vars(found.shape)
            | {
                "variant": variant,
                "seconds_per_token": vars(token_s),
                "tokens_per_s": found.shape.batch / token_s.median,
                "share_of_bound": bound_s / token_s.median,
                "speed_over_peer": vars(over) if over else None,
                "common_tokens": found.agreement[variant],
            }
        )
    for variant, reason in found.absent.items():
        records.append(vars(found.shape) | {"variant": variant, "absent": reason})
    return records


def _table(found: Decoded, models: _Models, copy: float) -> str:
    heads = ["variant", "ms per token", "tokens/s", f"times as fast as {_PEER}", "% of bound"]
    rows = [heads, ["---"] * len(heads)]
    bound_s = models.weight_bytes / copy
    for variant in found.agreement:
        token_s, over = found.seconds(variant), found.speed_over_peer(variant)
        rows.append(
            [
                variant,
                _text(token_s.scaled(1e3), "{:.4g}"),
                f"{found.shape.batch / token_s.median:,.0f}",
                _text(over, "{:.2f}") if over else "",
                f"{100 * bound_s / token_s.median:.1f}",
            ]
        )
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    common = ", ".join(f"{variant} {count}" for variant, count in found.agreement.items())
    notes = [
        f"Medians (smallest to largest) of {len(found.rounds)} rounds; eager and graph are ours, "
        f"ops backend {models.backend}.",
        f"Bound: {models.weight_bytes / 1e6:.4g} MB of weights read at the speed of a copy, "
        f"{bound_s * 1e3:.3g} ms; our states of {found.shape.batch} texts, "
        f"{models.state_bytes(found.shape.batch) / 1e6:.3g} MB, are read and written besides.",
        f"Tokens of {found.shape.new_tokens} before the first that differs: {common or 'none'}.",
        *(f"**{name}: not measured**: {why}" for name, why in found.absent.items()),
    ]
    return "\n".join([f"### {found.shape}", "", *lines, "", *(f"- {n}" for n in notes), ""])


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def _text(spread: Spread, form: str) -> str:
    middle, low, high = (form.format(v) for v in (spread.median, spread.low, spread.high))
    return f"{middle} ({low}–{high})"
