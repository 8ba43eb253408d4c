"""What a resumed run goes on reading: the same, or what the config explicitly lets change."""

import os

from mamba_dist.checkpoint.history import recorded_order
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.segments import (
    RunOrder,
    Segment,
    content_differences,
    shares,
)
from mamba_dist.errors import CheckpointError


def continued_order(reader: CheckpointReader, config: RunConfig, fresh: RunOrder) -> RunOrder:
    """The order of samples of a run that goes on; `fresh` is what its config would begin with.

    Raises:
        CheckpointError: what the order depends on changed, and is not in checkpoint.accept_changes.
    """
    _require_same_fields(reader, config)
    now = fresh.segments[0]
    order = recorded_order(reader.manifest, folder=reader.folder, sources=now.sources)
    last = order.segments[-1]
    _require_same_contents(reader, order, now)
    _require_same_tokenizer(reader, order, now)
    _require_same_samples(reader, order, now)
    order = order.moved({source.fingerprint: source.path for source in now.sources})
    changes = {
        "data_mixture": _mixture_changes(last, now),
        "global_batch_size": _batch_changes(last, now),
    }
    found = {name: lines for name, lines in changes.items() if lines}
    refused = [name for name in found if name not in config.checkpoint.accept_changes]
    if refused:
        said = "; ".join(line for name in refused for line in found[name])
        raise CheckpointError(
            f"{reader.folder}: {said}. Restore that, or let the run go on with the change from "
            f"step {reader.step} on by checkpoint.accept_changes=[{', '.join(found)}]"
        )
    if found:
        return order.changed(
            step=reader.step,
            sources=now.sources if found.get("data_mixture") else None,
            global_batch_size=now.global_batch_size,
        )
    return order


def _require_same_fields(reader: CheckpointReader, config: RunConfig) -> None:
    for field in ("sequence_length", "packing", "shuffle", "seed"):
        theirs, ours = getattr(reader.config.data, field), getattr(config.data, field)
        if theirs != ours:
            raise CheckpointError(
                f"{reader.folder}: was trained with data.{field} = {theirs!r}, the config says "
                f"{ours!r}; restore it: the order of samples depends on it"
            )


def _require_same_contents(reader: CheckpointReader, order: RunOrder, now: Segment) -> None:
    """Data that changed where it lies is an accident, not a change of the mixture."""
    current = {source.fingerprint for source in now.sources}
    known = {source.fingerprint for segment in order.segments for source in segment.sources}
    by_path = {os.path.realpath(source.path): source for source in now.sources}
    for saved in (source for segment in reversed(order.segments) for source in segment.sources):
        found = by_path.get(os.path.realpath(saved.path))
        if found is None or found.fingerprint in known:
            continue
        if saved.fingerprint not in current:
            raise CheckpointError(
                f"{reader.folder}: {saved.path} changed since the run read it (fingerprint "
                f"{saved.fingerprint[:12]}, now {found.fingerprint[:12]}): "
                f"{content_differences(saved.content, found.content)}. Restore it, or train in "
                "another run folder (training.run_dir=…); to go on with both, put the new data "
                "beside the old"
            )


def _require_same_tokenizer(reader: CheckpointReader, order: RunOrder, now: Segment) -> None:
    """The ids mean to the weights what they meant when these were trained."""
    before, after = order.segments[0].sources[0], now.sources[0]
    for field in ("tokenizer_sha256", "vocab_size", "eos_id"):
        old, new = getattr(before.content, field), getattr(after.content, field)
        if old != new:
            raise CheckpointError(
                f"{reader.folder}: was trained on ids of another tokenizer ({field} {old} in "
                f"{before.path}, {new} in {after.path}); tokenize the new data with the tokenizer "
                f"of {before.path}, or train in another run folder (training.run_dir=…)"
            )


def _require_same_samples(reader: CheckpointReader, order: RunOrder, now: Segment) -> None:
    before = {s.fingerprint: s.samples for one in order.segments for s in one.sources}
    for source in now.sources:
        if before.get(source.fingerprint, source.samples) != source.samples:
            raise CheckpointError(
                f"{reader.folder}: {source.path} gives {source.samples:,} samples an epoch, gave "
                f"{before[source.fingerprint]:,} when the run read it; restore how samples are cut"
            )


def _mixture_changes(last: Segment, now: Segment) -> list[str]:
    before = {source.fingerprint: source for source in last.sources}
    after = {source.fingerprint: source for source in now.sources}
    lines = [f"{s.path} left the mixture" for f, s in before.items() if f not in after]
    lines += [f"{s.path} is new in the mixture" for f, s in after.items() if f not in before]
    old_shares, new_shares = shares(last.sources), shares(now.sources)
    for fingerprint in before.keys() & after.keys():
        old, new = before[fingerprint], after[fingerprint]
        if old_shares[fingerprint] != new_shares[fingerprint]:
            was, now_is = float(old_shares[fingerprint]), float(new_shares[fingerprint])
            lines.append(f"the share of {new.path} was {was:.6g}, is {now_is:.6g}")
        if old.max_epochs != new.max_epochs:
            lines.append(
                f"max_epochs of {new.path} was {_limit(old.max_epochs)}, is "
                f"{_limit(new.max_epochs)}"
            )
    return lines


def _limit(max_epochs: int | None) -> str:
    return "null" if max_epochs is None else str(max_epochs)


def _batch_changes(last: Segment, now: Segment) -> list[str]:
    old, new = last.global_batch_size, now.global_batch_size
    if old == new:
        return []
    return [
        f"the run has {old} sequences per step, this start would have {new} "
        f"(training.global_batch_size={old}, without gradient_accumulation_steps, restores it)"
    ]
