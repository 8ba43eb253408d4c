"""tools/generate.py: continues prompts with the model of a run or checkpoint.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mamba_dist.checkpoint.reader import open_checkpoint
from mamba_dist.config.schema import MambaConfig, RunConfig
from mamba_dist.data.tokenization import Tokenizer, dataset_file_name, load_tokenizer
from mamba_dist.errors import DataError, MambaDistError
from mamba_dist.inference.generate import GenerationSettings, generate, stream
from mamba_dist.inference.precision import round_matrices
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.weights import load_parameters
from mamba_dist.ops.backend import resolve_backend

EXIT_USER_ERROR = 2
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class _Trained:
    model: MambaLM
    tokenizer: Tokenizer
    step: int


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`; the texts go to stdout."""
    arguments = _parser().parse_args(argv)
    try:
        trained = _load(Path(arguments.checkpoint), arguments.tokenizer)
        if arguments.precision == "bf16":
            round_matrices(trained.model)
        settings = _settings(arguments, trained)
        prompts = [p for p in arguments.prompt for _ in range(arguments.num_samples)]
        print(f"step {trained.step}, {len(prompts)} texts", file=sys.stderr)
        if len(prompts) == 1:
            _print_as_it_grows(trained, prompts[0], settings)
        else:
            _print_all(trained, prompts, settings)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/generate.py", description="Continue prompts with a trained model."
    )
    parser.add_argument(
        "checkpoint", help="run folder (its newest whole checkpoint) or a checkpoint"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be repeated"
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=128, help="default 128")
    parser.add_argument(
        "--temperature", type=_not_negative, default=1.0, help="0 is greedy; default 1.0"
    )
    parser.add_argument("--top-k", type=_positive, help="sample from the K most probable tokens")
    parser.add_argument(
        "--top-p", type=_share, help="sample from the most probable tokens that reach this share"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="default 0")
    parser.add_argument("--num-samples", type=_positive, default=1, help="texts per prompt")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the matrices; bf16 reads half as much per token; default fp32",
    )
    parser.add_argument(
        "--no-graph",
        action="store_true",
        help="on a GPU: launch each kernel of a token by itself, not as one CUDA graph",
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer.json or .model; default: data.tokenizer_path of the run's config",
    )
    return parser


def _load(checkpoint: Path, tokenizer: str | None) -> _Trained:
    reader = open_checkpoint(checkpoint, notice=_notice)
    config, trained_with = reader.config, reader.manifest.tokenizer
    path = Path(tokenizer) if tokenizer else _tokenizer_of(config)
    loaded = load_tokenizer(path, eos_token=trained_with.eos_token)
    if loaded.identity.sha256 != trained_with.sha256:
        raise DataError(
            f"tokenizer {path} has sha256 {loaded.identity.sha256[:12]}, the model was trained "
            f"with {trained_with.sha256[:12]}; give that one by --tokenizer"
        )
    model = _build(config.model)
    load_parameters(model, reader.read_parameters())
    return _Trained(model, loaded, reader.step)


def _tokenizer_of(config: RunConfig) -> Path:
    """The configured tokenizer, or the copy that every data set keeps if that is gone."""
    configured = Path(config.data.tokenizer_path)
    copy = Path(config.data.all_sources[0].path) / dataset_file_name(configured)
    return copy if copy.is_file() and not configured.is_file() else configured


def _notice(text: str) -> None:
    print(text, file=sys.stderr)


def _build(config: MambaConfig) -> MambaLM:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        # Not the backend of the run's config: it may have been trained on another kind of device.
        return MambaLM(config, backend=resolve_backend("auto", device_type=device.type)).eval()


def _settings(arguments: argparse.Namespace, trained: _Trained) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        eos_id=trained.tokenizer.eos_id,
        vocab_size=trained.tokenizer.vocab_size,
        seed=arguments.seed,
        sampling=SamplingSettings(arguments.temperature, arguments.top_k, arguments.top_p),
        graph=not arguments.no_graph,
    )


def _encode(trained: _Trained, prompts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in trained.tokenizer.encode_batch(prompts)]


def _print_as_it_grows(trained: _Trained, prompt: str, settings: GenerationSettings) -> None:
    [ids] = _encode(trained, [prompt])
    print(prompt, end="", flush=True)
    tokens: list[int] = []
    shown = 0
    for (token,) in stream(trained.model, [ids], settings):
        if token is None:
            break
        tokens.append(token)
        text = _continuation(trained, ids, tokens)
        # A character of several tokens is not readable before its last one.
        if not text.endswith(_REPLACEMENT):
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(_continuation(trained, ids, tokens)[shown:])


def _print_all(trained: _Trained, prompts: Sequence[str], settings: GenerationSettings) -> None:
    encoded = _encode(trained, prompts)
    texts = generate(trained.model, encoded, settings)
    for number, (prompt, ids, tokens) in enumerate(zip(prompts, encoded, texts, strict=True), 1):
        print(f"[{number}/{len(prompts)}] {prompt}{_continuation(trained, ids, tokens)}")


def _continuation(trained: _Trained, prompt: list[int], tokens: list[int]) -> str:
    # Decoded together with the prompt, since decoders treat the beginning of a text differently.
    before = trained.tokenizer.decode(prompt)
    return trained.tokenizer.decode(prompt + tokens)[len(before) :]


def _ranged(
    kind: Callable[[str], float], is_valid: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """A parser of one argument, whose error says what was expected."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


_positive = _ranged(int, lambda value: value >= 1, "a whole number from 1")
_seed = _ranged(int, lambda value: 0 <= value < 2**63, "a whole number from 0 below 2**63")
_not_negative = _ranged(float, lambda value: 0 <= value < math.inf, "a number from 0")
_share = _ranged(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
