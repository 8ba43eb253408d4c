"""Continues prompts: each is read by one scan, then every token costs the same at any length.

On a GPU each token is one launch of a captured graph (`graph.py`). A greedy choice stays there too:
the next step is under way before the host has read this one's token.

B texts, L tokens of a prompt, V vocabulary.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from mamba_dist.errors import ConfigError, DataError
from mamba_dist.inference.graph import DecodingSteps
from mamba_dist.inference.sampling import SamplingSettings, chosen_ids, most_probable, sample
from mamba_dist.inference.state import stack_states
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.state import LayerState
from mamba_dist.ops.readback import read_later

_Advance = Callable[[Tensor], Tensor]
"""From the next token of each text (B,) to the logits (B, V) after it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How far texts are continued, and how tokens are chosen.

    A text ends after `max_new_tokens` or at `eos_id`. Ids from `vocab_size` on are never chosen; it
    defaults to the model's, and a tokenizer may have fewer. The same seed gives the same texts.
    `graph` replays each step as a CUDA graph; other devices have none and decode without.

    The precision is the model's: fp32 parameters as they are loaded, or bf16 matrices after
    `round_matrices`, which halves what each token reads.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 128
    eos_id: int | None = None
    vocab_size: int | None = None
    seed: int = 0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    graph: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError(f"vocab_size is {self.vocab_size}, expected at least 1")


def generate(
    model: MambaLM,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    steps: DecodingSteps | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the end-of-sequence token; see `stream`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, settings, steps=steps):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: MambaLM,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    steps: DecodingSteps | None = None,
) -> Iterator[tuple[int | None, ...]]:
    """For each step the new token of every prompt, None once its text has ended.

    Runs on the model's device. The i-th text draws from a random stream of its own, so it depends
    on the other prompts only through the rounding of batched matrix products. `steps` are captured
    steps of `model` to use and to keep for the next call; without them a call on a GPU captures its
    own.

    Raises:
        DataError: a prompt is empty or holds ids that the model does not have.
        ModelError: the model computes NaN.
        BackendError: the step cannot be captured as a CUDA graph.
        ValueError: `steps` are another model's.
    """
    if steps is not None and steps.model is not model:
        raise ValueError(
            "steps decode with the model that they were made for, and this is another one; make "
            "DecodingSteps(model) for it"
        )
    vocab_size = model.config.vocab_size
    _require_known_tokens(prompts, vocab_size)
    if not prompts:
        return
    logits, states = _read_prompts(model, prompts)
    steps = _graphs(model, settings, steps)
    ended = [False] * len(prompts)
    with _begun(model, states, steps) as advance:
        is_ahead = steps is not None and settings.sampling.temperature == 0
        choose = _greedily if is_ahead else _one_by_one
        for tokens in choose(logits, advance, settings, vocab_size):
            ended = [e or t == settings.eos_id for e, t in zip(ended, tokens, strict=True)]
            yield tuple(None if e else t for e, t in zip(ended, tokens, strict=True))
            if all(ended):
                return


def _graphs(
    model: MambaLM, settings: GenerationSettings, steps: DecodingSteps | None
) -> DecodingSteps | None:
    """What captures the steps; None where each one is to be computed by itself."""
    # The only token of a text comes with its prompt, and no step is taken.
    if not settings.graph or settings.max_new_tokens == 1:
        return None
    if steps is not None:
        return steps
    device = model.backbone.embedding.weight.device
    if device.type == "cuda":
        return DecodingSteps(model)
    _log.info("decoding without a CUDA graph: the model is on %s", device)
    return None


def _begun(
    model: MambaLM, states: Sequence[LayerState], steps: DecodingSteps | None
) -> AbstractContextManager[_Advance]:
    return nullcontext(_EagerStep(model, states)) if steps is None else steps.begun(states)


class _EagerStep:
    """One token of B texts, each operation by itself; the states are those of the last call."""

    def __init__(self, model: MambaLM, states: Sequence[LayerState]) -> None:
        self._model = model
        self._states = states

    def __call__(self, tokens: Tensor) -> Tensor:
        logits, self._states = _advance(self._model, tokens[:, None], self._states)
        return logits


def _one_by_one(
    logits: Tensor, advance: _Advance, settings: GenerationSettings, vocab_size: int
) -> Iterator[list[int]]:
    """The tokens (B,) of each step, chosen on the host."""
    allowed = min(vocab_size, settings.vocab_size or vocab_size)
    generators = [_generator(settings.seed, text) for text in range(len(logits))]
    for _ in range(settings.max_new_tokens - 1):
        tokens = sample(logits[:, :allowed], settings.sampling, generators=generators)
        yield tokens.tolist()
        logits = advance(tokens)
    yield sample(logits[:, :allowed], settings.sampling, generators=generators).tolist()


def _greedily(
    logits: Tensor, advance: _Advance, settings: GenerationSettings, vocab_size: int
) -> Iterator[list[int]]:
    """The tokens (B,) of each step, chosen on the device, which is one step ahead of the caller."""
    allowed = min(vocab_size, settings.vocab_size or vocab_size)
    choice = most_probable(logits[:, :allowed])
    for _ in range(settings.max_new_tokens - 1):
        arrived = read_later(choice)
        choice = most_probable(advance(choice[0])[:, :allowed])
        yield chosen_ids(arrived())
    yield chosen_ids(choice.tolist())


def _read_prompts(
    model: MambaLM, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, list[LayerState]]:
    """Logits (B, V) after each prompt, and the states; equal prompts are read once."""
    read = {
        prompt: _advance(model, torch.tensor([prompt], dtype=torch.int64))
        for prompt in dict.fromkeys(map(tuple, prompts))
    }
    ends = [read[tuple(prompt)] for prompt in prompts]
    return torch.cat([logits for logits, _ in ends]), stack_states([states for _, states in ends])


@torch.no_grad()
def _advance(
    model: MambaLM, tokens: Tensor, states: Sequence[LayerState] | None = None
) -> tuple[Tensor, list[LayerState]]:
    """Logits (B, V) after `tokens` (B, L), and the states there."""
    device = model.backbone.embedding.weight.device
    logits, states = model.forward_with_state(tokens.to(device), states, last_only=True)
    return logits[:, -1], states


def _generator(seed: int, text: int) -> Generator:
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big"))


def _require_known_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(f"prompt {number} has no tokens, expected at least one")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise DataError(
                f"prompt {number} holds token ids {min(prompt)} to {max(prompt)}, the model has 0 "
                f"to {vocab_size - 1}; use the tokenizer that the model was trained with"
            )
