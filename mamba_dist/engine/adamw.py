"""torch's fused AdamW as the engines use it: it clips and skips on the device.

What the host decides about a step it would have to wait for; here the norm and the verdict stay
tensors, and the host reads them when it has queued the update.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mamba_dist.engine.base import OptimizerSettings, ParameterGroup, StepStats
from mamba_dist.ops.readback import read_later


def adamw(
    tensors: Mapping[str, Tensor],
    groups: Sequence[ParameterGroup],
    settings: OptimizerSettings,
) -> torch.optim.AdamW:
    """AdamW over the tensors that `groups` name, at learning rate 0."""
    return torch.optim.AdamW(
        [
            {"params": [tensors[name] for name in group.names], "weight_decay": group.weight_decay}
            for group in groups
            if group.names
        ],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def materialise_moments(optimizer: torch.optim.AdamW, masters: Iterable[Tensor]) -> None:
    """Gives each of the tensors that are updated its state, all zeros.

    AdamW creates it at the first update, but a checkpoint may be read or written before that.
    """
    for master in masters:
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(master, memory_format=torch.preserve_format),
        }


def judge(
    optimizer: torch.optim.AdamW,
    norm: Tensor,
    *,
    max_grad_norm: float | None,
    skip_above: float | None,
) -> Callable[[], StepStats]:
    """Has the optimizer's next step clip by the gradients' norm, () fp32, or do nothing.

    It does nothing if the norm is not finite or above `skip_above`. What comes back waits for the
    device; call it after the step.
    """
    limit = float("inf") if skip_above is None else skip_above
    # A NaN compares false with everything, so the condition is asked the other way round.
    bad = ~(norm.double() <= limit) | norm.isinf()
    report = read_later(torch.stack([norm, bad.float()]))
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = (  # type: ignore[attr-defined]
        None if max_grad_norm is None else torch.clamp((norm + 1e-6) / max_grad_norm, min=1.0)
    )

    def stats() -> StepStats:
        found, skipped = report()
        return StepStats(grad_norm=found, skipped=bool(skipped))

    return stats
