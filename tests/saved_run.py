"""A real checkpoint of a run that read samples in a given order, with one tiny parameter."""

from collections.abc import Mapping
from pathlib import Path

import torch
from written_checkpoint import OneRank

from mamba_dist.checkpoint.manifest import TokenizerRecord
from mamba_dist.checkpoint.store import Snapshot, save_checkpoint
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import RunOrder
from mamba_dist.engine.base import Fragment
from mamba_dist.train.state import beginning


def save_run(
    run_dir: Path,
    config: RunConfig,
    order: RunOrder,
    *,
    step: int,
    recorded: bool = True,
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Commits the checkpoint of a step; not `recorded`: as it was before there were mixtures."""
    if parameters is None:
        parameters = {"a": torch.zeros(4)}
    progress = beginning(order).model_copy(
        update={
            "step": step,
            "next_sample": order.positions(step).start,
            "segments": order.segments if recorded else (),
        }
    )
    snapshot = Snapshot(
        progress=progress,
        adam_steps=step,
        fragments=[
            Fragment(name, tuple(one.shape), 0, flat, flat, flat)
            for name, one in parameters.items()
            for flat in [one.detach().flatten()]
        ],
        config=config,
        tokenizer=TokenizerRecord(sha256="0", eos_token="e"),
        engine="test",
        versions={},
    )
    save_checkpoint(run_dir, snapshot, ranks=OneRank())
