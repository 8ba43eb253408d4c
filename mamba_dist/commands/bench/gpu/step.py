"""What a process of bench gpu-train does: training steps of one variant on one batch, timed.

The batch stays the same, so that its loss falls and tells variants apart that update differently.

B batch, L length.
"""

import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from mamba_dist.commands.bench.gpu.failures import reason_of
from mamba_dist.commands.bench.gpu.profile import Profile, profiled, timing_event
from mamba_dist.config.schema import RunConfig
from mamba_dist.model.param_groups import classify

LEARNING_RATE: Final = 1e-4
MAX_GRAD_NORM: Final = 1.0
SEED: Final = 0
# The size by which the matrix units' speed is usually told.
_MATMUL_SIZE: Final = 8192
_MATMUL_WARM: Final = 10
_MATMUL_COUNT: Final = 50

Batch = Mapping[str, Tensor]
"""input_ids and labels, (B, L) int64, and seq_idx, (B, L) int32, if there are documents."""
Step = Callable[[], Tensor]
"""One optimizer step; the loss summed over its labels before it, () fp32, not waited for."""


@dataclass(frozen=True)
class StepSpec:
    """One variant's run.

    documents: packed in each row, None for one without `seq_idx`. accumulation: micro-batches of
    `batch` sequences in an optimizer step.
    """

    variant: str
    config: RunConfig
    batch: int
    length: int
    documents: int | None
    warmup: int
    steps: int
    profile: bool
    accumulation: int = 1

    @property
    def tokens(self) -> int:
        """Labels of a step."""
        return self.batch * self.accumulation * self.length


@dataclass(frozen=True)
class StepResult:
    """What one run has found.

    step_s: of each timed step. losses: nats per token of every step, the first one included.
    peak_bytes: allocated on the device since the start, None on a CPU. peak_reserved_bytes: what
    torch held for it, the gaps and a CUDA graph's own memory included, None on a CPU.
    matmul_flops_per_s: of large bf16 products on this device just before, None on a CPU.
    """

    device: str
    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    peak_bytes: int | None
    peak_reserved_bytes: int | None
    matmul_flops_per_s: float | None
    profile: Profile | None


def serve(build: Callable[[StepSpec, Batch], Step]) -> None:
    """Reads a pickled StepSpec from stdin, writes the answer to the named file, ends the process.

    The answer is a flag for success, and a StepResult or a message. It does not go to stdout:
    packages print what they like there, some of them when they are imported.
    """
    reply: tuple[bool, StepResult | str]
    try:
        reply = (True, _measured(pickle.load(sys.stdin.buffer), build))
    # Whatever a variant dies of: the parent measures the others all the same.
    except Exception as error:
        reply = (False, reason_of(error))
    Path(sys.argv[1]).write_bytes(pickle.dumps(reply))
    sys.stdout.flush()
    sys.stderr.flush()
    # As launch/train.py does, and for the same reason.
    os._exit(0)


def plain_step(model: nn.Module, spec: StepSpec, loss_sum: Callable[[], Tensor]) -> Step:
    """The step of a plain PyTorch loop: autocast, foreach clipping, fused AdamW."""
    device_type = next(model.parameters()).device.type
    parameters = dict(model.named_parameters())
    classes = classify(model)
    training = spec.config.training
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters[c.name] for c in classes if c.decay == decay],
                "weight_decay": training.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ],
        lr=LEARNING_RATE,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_eps,
        fused=True,
    )

    def micro_batch() -> Tensor:
        with torch.autocast(device_type, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = loss_sum()
        (loss / spec.tokens).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses = [micro_batch() for _ in range(spec.accumulation)]
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM, foreach=True)
        optimizer.step()
        return torch.stack(losses).sum()

    return step


def this_device() -> torch.device:
    """The first GPU that this process sees, or the CPU if it sees none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def random_batch(spec: StepSpec, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, with documents of random lengths if there are any; see `Batch`."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (spec.batch, spec.length + 1)
    tokens = torch.randint(0, spec.config.model.vocab_size, shape, generator=generator)
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    if spec.documents is not None:
        starts = torch.zeros(spec.batch, spec.length, dtype=torch.int32)
        for row in starts:
            inside = 1 + torch.randperm(spec.length - 1, generator=generator)
            row[inside[: spec.documents - 1]] = 1
        batch["seq_idx"] = starts.cumsum(1, dtype=torch.int32)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _measured(spec: StepSpec, build: Callable[[StepSpec, Batch], Step]) -> StepResult:
    device = this_device()
    on_gpu = device.type == "cuda"
    limit = _matmul_flops_per_s(device) if on_gpu else None
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = build(spec, random_batch(spec, device))
    losses = [step() for _ in range(spec.warmup)]
    seconds = _on_gpu(step, spec.steps, losses) if on_gpu else _on_cpu(step, spec.steps, losses)
    return StepResult(
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        step_s=tuple(seconds),
        losses=tuple(float(loss) / spec.tokens for loss in losses),
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_gpu else None,
        matmul_flops_per_s=limit,
        profile=profiled(step) if spec.profile else None,
    )


def _on_gpu(step: Step, count: int, losses: list[Tensor]) -> list[float]:
    """Seconds from each step's start to the next one's, with no wait between them."""
    torch.cuda.synchronize()
    marks = [timing_event() for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        losses.append(step())
        mark.record()
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def _on_cpu(step: Step, count: int, losses: list[Tensor]) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(count):
        losses.append(step())
        marks.append(time.perf_counter())
    return [b - a for a, b in pairwise(marks)]


def _matmul_flops_per_s(device: torch.device) -> float:
    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    a, b, c = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(3))
    start, end = timing_event(), timing_event()
    for number in range(_MATMUL_WARM + _MATMUL_COUNT):
        if number == _MATMUL_WARM:
            start.record()
        torch.mm(a, b, out=c)
    end.record()
    end.synchronize()
    seconds = float(start.elapsed_time(end)) / 1e3
    return 2.0 * _MATMUL_SIZE**3 * _MATMUL_COUNT / seconds
