"""bench train: forward and backward of whole language models, ours beside the limit and others.

All variants of a table have the same parameters, inputs, precision, threads and allocator.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from mamba_dist.commands.bench.limit import limit_model
from mamba_dist.commands.bench.spec import Allocator, Group, Row, TrainSpec, dtype_name
from mamba_dist.config.report import config_error, schema_problems
from mamba_dist.config.schema import MambaConfig, RunConfig
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import resolve_backend

OURS: Final = ("cpu", "torch")
LIMIT: Final = "limit"
VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "mamba1": (*OURS, LIMIT, "hf-scan", "mambapy", "hf-default"),
    "mamba2": (*OURS, LIMIT, "hf"),
}
DESCRIPTIONS: Final = {
    "cpu": "ours, backend cpu",
    "torch": "ours, backend torch",
    LIMIT: "limit: ours, scan and convolution elementwise",
    "hf-scan": "Hugging Face, use_mambapy=True",
    "hf-default": "Hugging Face, default path",
    "mambapy": "mamba.py",
    "hf": "Hugging Face",
}
# Deviation in norm from the float64 truth, of the loss and of each parameter's gradient. Peers are
# held to it too: it tells the same model from another one, not one rounding from another.
_ALLOWED: Final = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# Share of the root mean square of all gradients below which one is compared with that instead.
_CANCELLED: Final = 0.1
_CHECKED_LENGTH: Final = 96
# Hugging Face's loop over the sequence takes four times as long for twice the length.
_LONGEST_LOOP: Final = 512


@dataclass(frozen=True)
class Preset:
    """A model and a batch whose numbers we publish."""

    d_model: int
    n_layers: int
    vocab_size: int
    batch: int
    lengths: tuple[int, ...]
    variants: tuple[str, ...] | None = None
    """None is all of the layer's."""


PRESETS: Final[Mapping[str, Preset]] = {
    "small": Preset(256, 4, 4096, 2, (512,)),
    # Peers hold (B, L, E, N) several times per layer: 10 GB and minutes per step at this size.
    "body": Preset(768, 4, 4096, 1, (2048,), (*OURS, LIMIT)),
    "length": Preset(256, 2, 4096, 1, (512, 1024, 2048, 4096, 8192, 16384), ("cpu",)),
}


def groups(
    title: str,
    preset: Preset,
    layer: str,
    *,
    optimizer: bool,
    dtypes: Sequence[torch.dtype],
    allocators: Sequence[Allocator],
    only: Container[str] | None,
) -> list[Group]:
    """What to measure; with several lengths each is a variant, and the first one the baseline.

    `only` replaces the preset's choice of variants.

    Raises:
        ConfigError: there is no model of that shape.
    """
    config = _model_config(preset, layer)
    variants = [v for v in VARIANTS[layer] if _chosen(v, preset, only)]
    return [
        _group(title, preset, TrainSpec("", config, preset.batch, 0, dtype, optimizer), variants, a)
        for dtype in dtypes
        for a in allocators
    ]


def build_model(spec: TrainSpec) -> nn.Module:
    """A variant that needs no peer's package."""
    if spec.variant == LIMIT:
        return limit_model(spec.config, backend=resolve_backend("auto", device_type="cpu"))
    return MambaLM(spec.config, backend=spec.variant)


def _model_config(preset: Preset, layer: str) -> MambaConfig:
    fields = {
        "layer": layer,
        "d_model": preset.d_model,
        "n_layers": preset.n_layers,
        "vocab_size": preset.vocab_size,
        # Peers pad no vocabulary.
        "pad_vocab_size_multiple": 1,
    }
    # The errors of a config name the fields of a whole one.
    training = {"micro_batch_size": 1, "global_batch_size": 1, "max_steps": 1, "warmup_steps": 0}
    try:
        return RunConfig.model_validate({"model": fields, "training": training}).model
    except ValidationError as error:
        raise config_error(schema_problems(error), source="the model to measure") from error


def _chosen(variant: str, preset: Preset, only: Container[str] | None) -> bool:
    if only is not None:
        return variant in only
    if variant == "hf-default" and max(preset.lengths) > _LONGEST_LOOP:
        return False
    return preset.variants is None or variant in preset.variants


def _group(
    title: str, preset: Preset, blank: TrainSpec, variants: Sequence[str], allocator: Allocator
) -> Group:
    specs = {
        (variant, length): replace(blank, variant=variant, length=length)
        for length in preset.lengths
        for variant in variants
    }
    several = len(preset.lengths) > 1

    def name(variant: str, length: int) -> str:
        return f"{variant} L{length}" if several else variant

    def description(variant: str, length: int) -> str:
        return DESCRIPTIONS[variant] + (f", L{length}" if several else "")

    config = blank.config
    shape = (
        f"{config.layer} d_model {config.d_model}, {config.n_layers} layers, vocabulary "
        f"{config.vocab_size}, B{preset.batch} L{preset.lengths[0]}"
        + (f" to {preset.lengths[-1]}" if several else "")
        + f", {dtype_name(blank.dtype)}, {allocator} malloc"
        + (", with AdamW" if blank.optimizer else "")
    )
    return Group(
        title=f"{title}: {shape}",
        rows=[Row(name(*key), description(*key), preset.batch * key[1]) for key in specs],
        specs={name(*key): spec for key, spec in specs.items()},
        allocator=allocator,
        baselines=[name(v, preset.lengths[0]) for v in OURS],
        limit=None if several else LIMIT,
    )


class TrainJob:
    """Forward and backward of the loss, a sum over tokens, on the same batch again and again."""

    def __init__(self, spec: TrainSpec, model: nn.Module) -> None:
        self._spec = spec
        self._model = model.train()
        self._parameters = _by_our_names(model)
        self._initialize()
        self._batch = _random_batch(spec)
        self._optimizer = (
            torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) if spec.optimizer else None
        )
        self.allowed = _ALLOWED[spec.dtype]

    def step(self) -> None:
        """Gradients of all parameters, and AdamW's update if it was asked for."""
        self._backward(self._batch)
        if self._optimizer is not None:
            self._optimizer.step()

    def errors(self) -> dict[str, float] | None:
        """Of the loss and each gradient, against our model in float64 with the reference loop."""
        if self._spec.variant == LIMIT:
            return None
        self._initialize()
        batch = self._batch[:, :, :_CHECKED_LENGTH]
        truth = MambaLM(self._spec.config, backend="reference").double()
        initialize(truth, self._spec.config, seed=0, gather=_whole)
        true_loss = truth(*batch)
        true_loss.backward()
        loss = self._backward(batch)
        errors = {"the loss": _deviation(loss, true_loss, floor=0.0)}
        gradients = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
        everything = torch.cat([gradient.flatten() for gradient in gradients.values()])
        # A gradient that cancels out, as that of D before a norm, has no digits in bf16.
        floor = _CANCELLED * float(everything.square().mean().sqrt())
        for name, gradient in gradients.items():
            found = self._parameters[name].grad
            errors[f"d {name}"] = (
                float("nan") if found is None else _deviation(found, gradient, floor=floor)
            )
        return errors

    def _backward(self, batch: Tensor) -> Tensor:
        for parameter in self._parameters.values():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=self._spec.dtype == torch.bfloat16):
            loss = self._loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self._model, MambaLM):
            loss: Tensor = self._model(input_ids, labels)
            return loss
        logits = self._model(input_ids)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    def _initialize(self) -> None:
        """Gives the model the values that ours has at the start of a run."""
        with torch.device("meta"):
            ours = MambaLM(self._spec.config)
        left = ours.load_state_dict(self._parameters, strict=False, assign=True)
        tied = ["lm_head.weight"] if self._spec.config.tie_embeddings else []
        assert left.missing_keys == tied, left
        assert not left.unexpected_keys, left
        if tied:
            ours.lm_head.weight = ours.backbone.embedding.weight
        initialize(ours, self._spec.config, seed=0, gather=_whole)


def _by_our_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("model.").replace("backbone.embeddings.", "backbone.embedding."): p
        for name, p in model.named_parameters()
    }


def _random_batch(spec: TrainSpec) -> Tensor:
    """input_ids and labels, (2, B, L) int64."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, spec.batch, spec.length)
    return torch.randint(0, spec.config.vocab_size, shape, generator=generator)


def _deviation(found: Tensor, truth: Tensor, *, floor: float) -> float:
    """Root mean square of the difference over the truth's, or over `floor` if that is larger."""
    exact = truth.detach().double()
    off = (found.detach().double() - exact).square().mean().sqrt()
    return float(off / exact.square().mean().sqrt().clamp_min(max(floor, 1e-30)))


def _whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()
