"""Continues prompts: each is read by one scan, then every token costs the same at any length.

B texts, L tokens of a prompt, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from mamba_dist.errors import ConfigError, DataError
from mamba_dist.inference.sampling import SamplingSettings, sample
from mamba_dist.inference.state import stack_states
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.state import LayerState


@dataclass(frozen=True)
class GenerationSettings:
    """How far texts are continued, and how tokens are chosen.

    A text ends after `max_new_tokens` or at `eos_id`. Ids from `vocab_size` on are never chosen; it
    defaults to the model's, and a tokenizer may have fewer. The same seed gives the same texts.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 128
    eos_id: int | None = None
    vocab_size: int | None = None
    seed: int = 0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


def generate(
    model: MambaLM, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[list[int]]:
    """The new tokens of each prompt, without the end-of-sequence token; see `stream`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, settings):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def stream(
    model: MambaLM, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> Iterator[tuple[int | None, ...]]:
    """For each step the new token of every prompt, None once its text has ended.

    Runs on the model's device. The i-th text draws from a random stream of its own, so it depends
    on the other prompts only through the rounding of batched matrix products.

    Raises:
        DataError: a prompt is empty or holds ids that the model does not have.
        ModelError: the model computes NaN.
    """
    vocab_size = model.config.vocab_size
    _require_known_tokens(prompts, vocab_size)
    if not prompts:
        return
    allowed = min(vocab_size, settings.vocab_size or vocab_size)
    generators = [_generator(settings.seed, text) for text in range(len(prompts))]
    logits, states = _read_prompts(model, prompts)
    ended = [False] * len(prompts)
    for step in range(1, settings.max_new_tokens + 1):
        tokens = sample(logits[:, :allowed], settings.sampling, generators=generators)
        ended = [e or t == settings.eos_id for e, t in zip(ended, tokens.tolist(), strict=True)]
        yield tuple(None if e else t for e, t in zip(ended, tokens.tolist(), strict=True))
        if all(ended) or step == settings.max_new_tokens:
            return
        logits, states = _advance(model, tokens[:, None], states)


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
