"""Real checkpoints of a made-up state, written by its own stages as any number of ranks."""

from collections.abc import Iterable
from pathlib import Path

import torch

from mamba_dist.checkpoint.layout import checkpoint_folder, staging_folder
from mamba_dist.checkpoint.manifest import Progress, TokenizerRecord
from mamba_dist.checkpoint.rank_file import write_rank
from mamba_dist.checkpoint.ranks import OneRank
from mamba_dist.checkpoint.store import Snapshot, commit, prepare_staging
from mamba_dist.config.schema import MambaConfig, RunConfig, TrainingConfig
from mamba_dist.engine.base import STATE_KINDS, Fragment, flat_share

SHAPES = {"a": (3, 5), "b": (7,), "c": (1,)}

State = dict[str, dict[str, torch.Tensor]]


class RankOf(OneRank):
    """One of several ranks whose stages a test runs in turn; the others always agree."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def state_of(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    return {
        name: {kind: torch.randn(shape, generator=generator) for kind in STATE_KINDS}
        for name, shape in SHAPES.items()
    }


def fragments_of(
    step: int, *, rank: int = 0, size: int = 1, state: State | None = None, flat: bool = False
) -> list[Fragment]:
    """A rank's share of each parameter or, if `flat`, of all of them laid end to end."""
    found = []
    state = state_of(step) if state is None else state
    total = sum(kinds["master"].numel() for kinds in state.values())
    offset = 0
    for name, kinds in state.items():
        whole = kinds["master"].numel()
        if flat:
            first, length = flat_share(total, rank=rank, world_size=size)
            start, end = max(first - offset, 0), min(first + length - offset, whole)
        else:
            start, length = flat_share(whole, rank=rank, world_size=size)
            end = start + length
        if end > start:
            parts = [kinds[kind].flatten()[start:end] for kind in STATE_KINDS]
            found.append(Fragment(name, tuple(kinds["master"].shape), start, *parts))
        offset += whole
    return found


def run_config(**model) -> RunConfig:
    return RunConfig(
        model=MambaConfig(d_model=16, n_layers=1, vocab_size=11, **model),
        training=TrainingConfig(max_steps=9, warmup_steps=1, global_batch_size=32),
    )


def snapshot(
    step: int,
    *,
    fragments: Iterable[Fragment] | None = None,
    config: RunConfig | None = None,
    saved_at: float | None = None,
    val_loss: float | None = None,
    **progress,
) -> Snapshot:
    return Snapshot(
        progress=Progress(
            **{
                "step": step,
                "next_sample": 4 * step,
                "trained_tokens": 99 * step,
                "global_batch_size": 4,
                "data_fingerprint": "f",
                **progress,
            }
        ),
        adam_steps=step - 1,
        fragments=fragments_of(step) if fragments is None else fragments,
        config=run_config() if config is None else config,
        tokenizer=TokenizerRecord(sha256="0", eos_token="e"),
        engine="test",
        versions={"torch": torch.__version__},
        saved_at=saved_at,
        val_loss=val_loss,
    )


def write_as_ranks(
    run_dir: Path,
    step: int,
    size: int,
    *,
    state: State | None = None,
    flat: bool = False,
    config: RunConfig | None = None,
    **progress,
) -> Path:
    """A save of `size` ranks, one after the other in this process, by its own stages."""
    folder = checkpoint_folder(run_dir, step)
    staging = stage_as_ranks(run_dir, step, size, state=state, flat=flat, config=config, **progress)
    commit(staging, folder)
    return folder


def stage_as_ranks(
    run_dir: Path,
    step: int,
    size: int,
    *,
    written: Iterable[int] | None = None,
    state: State | None = None,
    flat: bool = False,
    config: RunConfig | None = None,
    **progress,
) -> Path:
    """A save of `size` ranks before its commit, with the parts of the `written` ones, or of all."""
    taken = snapshot(step, config=config, **progress)
    prepare_staging(run_dir, taken, ranks=RankOf(0, size))
    staging = staging_folder(run_dir, step)
    for rank in range(size) if written is None else written:
        fragments = fragments_of(step, rank=rank, size=size, state=state, flat=flat)
        write_rank(staging, rank, fragments)
    return staging
