"""The models of bench gpu-decode, and the judge of what they write.

Ours and mamba-ssm's have the same weights and bf16 matrices.

B texts, L tokens of the prompt, K new tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from mamba_dist.commands.bench.gpu.peer_model import peer_model
from mamba_dist.config.schema import MambaConfig
from mamba_dist.inference.generate import GenerationSettings, generate
from mamba_dist.inference.graph import DecodingSteps
from mamba_dist.inference.precision import round_matrices
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import resolve_backend

Decode = Callable[[int], list[list[int]]]
"""From a number of tokens K to the new tokens (B, K) of each text."""

PEER: Final = "mamba-ssm"
# Ends of parameters' names, and factors by which their values make a text depend on all states.
_VARIED: Final = {"out_proj.weight": 64.0, "mixer.D": 0.0, "x_proj.weight": 4.0}
# How far below the best logit a greedy choice may lie, of the way to the mean logit. On a CPU
# roundings of activations made 0.02 of it, with 24 layers those of the weights that are bf16 in
# mamba-ssm 0.03, and states that do not move 0.3 at least and mostly more than 1.
_ALLOWED: Final = 0.1
# That a peer computes the same function is asked, not how it rounds.
_PEER_ALLOWED: Final = 0.25


@dataclass(frozen=True)
class Shape:
    """B texts that grow by K tokens after L."""

    batch: int
    prompt: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch}, prompt {self.prompt}, {self.new_tokens} new tokens"


class Models:
    """Our model and, once it is asked for, mamba-ssm's with the same weights."""

    def __init__(self, config: MambaConfig, backend: str, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._theirs: Any = None
        self.backend = resolve_backend(backend, device_type=device.type)
        with device:
            ours = MambaLM(config, backend=self.backend).eval()
        initialize(ours, config, seed=0, gather=lambda _: nullcontext())
        _make_texts_vary(ours)
        self._ours = round_matrices(ours)
        # Asked for once, while the device surely works.
        self.text_state_bytes = self._text_state_bytes()
        """The states of our layers for one text."""

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
    def _text_state_bytes(self) -> int:
        _, states = self._ours.forward_with_state(
            torch.zeros(1, 1, dtype=torch.int64).to(self._device)
        )
        return sum(s.conv.nbytes + s.ssm.nbytes for s in states)

    def prompt(self, length: int) -> Tensor:
        """The prompt (L,) int64 of every text."""
        draw = torch.Generator().manual_seed(7)
        return torch.randint(0, self._config.vocab_size, (length,), generator=draw)

    def decode(self, variant: str, shape: Shape) -> Decode:
        """The variant, ready to run.

        Raises:
            BackendError: the peer cannot be imported.
            NotMeasuredError: the peer cannot be given our model's shape.
        """
        prompts = self.prompt(shape.prompt).expand(shape.batch, -1)
        if variant != PEER:
            steps = DecodingSteps(self._ours) if variant == "graph" else None
            return partial(_ours, self._ours, prompts.tolist(), steps)
        if self._theirs is None:
            self._theirs = _their_model(self._config, self._ours, self._device)
        # Their cache takes one batch for a part of another.
        self._theirs._decoding_cache = None
        inputs = prompts.contiguous().to(self._device)
        return partial(_theirs, self._theirs, inputs, self._config.vocab_size)

    def judge(self, variant: str, shape: Shape) -> "Judge":
        """Of the variant's texts after the shape's prompts."""
        allowed = _PEER_ALLOWED if variant == PEER else _ALLOWED
        return Judge(self._ours, self.prompt(shape.prompt).tolist(), shape.batch, allowed)


class Judge:
    """Whether greedy texts are the model's.

    Each text is read by our model as a whole, so that every choice is judged after the tokens that
    were chosen before it: two tokens that are nearly equally probable may change places by rounding
    and lead to different texts, but neither is a bad choice in its own.
    """

    def __init__(self, model: MambaLM, prompt: Sequence[int], batch: int, allowed: float) -> None:
        self._model = model
        self._prompt = prompt
        self._batch = batch
        self._allowed = allowed
        self._right: set[tuple[int, ...]] = set()

    def objection(self, texts: Sequence[Sequence[int]], new_tokens: int) -> str | None:
        """What is wrong with the new tokens (B, K) of all texts; None if nothing is."""
        if [len(text) for text in texts] != [new_tokens] * self._batch:
            lengths = sorted({len(text) for text in texts})
            return (
                f"{len(texts)} texts of {', '.join(map(str, lengths))} tokens, expected "
                f"{self._batch} of {new_tokens}"
            )
        # Rounds repeat their texts, and so do the rows of a batch.
        for text in {*map(tuple, texts)} - self._right:
            reason = self._objection_to(text)
            if reason is not None:
                return reason
            self._right.add(text)
        return None

    @torch.no_grad()
    def _objection_to(self, text: tuple[int, ...]) -> str | None:
        vocab_size = self._model.config.vocab_size
        if not 0 <= min(text) <= max(text) < vocab_size:
            return (
                f"a text has token ids {min(text)} to {max(text)}, the model 0 to {vocab_size - 1}"
            )
        logits = self._logits(text)[:, :vocab_size].float()
        best, favourites = logits.max(-1)
        chosen = logits.gather(1, torch.tensor(text, device=logits.device)[:, None])[:, 0]
        distances = ((best - chosen) / (best - logits.mean(-1))).tolist()
        for place, distance in enumerate(distances):
            # NaN compares false.
            if not distance <= self._allowed:
                return (
                    f"token {place + 1} of a text is {text[place]}, which lies below the model's "
                    f"choice {int(favourites[place])} by {distance:.2g} of the way to the mean "
                    f"logit, allowed {self._allowed:g}"
                )
        return None

    def _logits(self, text: tuple[int, ...]) -> Tensor:
        """From which each token of the text was to be chosen, (K, V)."""
        device = self._model.backbone.embedding.weight.device
        first, states = self._model.forward_with_state(
            torch.tensor([self._prompt], device=device), last_only=True
        )
        if len(text) == 1:
            return first[0]
        read = torch.tensor([text[:-1]], device=device)
        others, _ = self._model.forward_with_state(read, states)
        return torch.cat([first, others], dim=1)[0]


@torch.no_grad()
def _make_texts_vary(model: MambaLM) -> None:
    """Changes weights so that a text tells whether the states behind it are right.

    As it is initialised, a model whose embedding is its head repeats the last token for ever, and
    what states add to the present token is too little to change a choice. Times do not depend on
    values.
    """
    for name, parameter in model.named_parameters():
        for ending, factor in _VARIED.items():
            if name.endswith(ending):
                parameter.mul_(factor)


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


def _their_model(config: MambaConfig, ours: MambaLM, device: torch.device) -> nn.Module:
    model = peer_model(config, device=device, dtype=torch.bfloat16).eval()
    left = model.load_state_dict(dict(ours.named_parameters()), strict=False)
    assert left.missing_keys == (["lm_head.weight"] if config.tie_embeddings else []), left
    assert not left.unexpected_keys, left
    return model
