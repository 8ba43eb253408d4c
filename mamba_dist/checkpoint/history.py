"""The order of samples that a run had up to one of its checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mamba_dist.checkpoint.manifest import CheckpointManifest
from mamba_dist.data.segments import RunOrder, SourceRecord, first_segment
from mamba_dist.errors import CheckpointError


def recorded_order(
    manifest: CheckpointManifest, *, folder: Path, sources: Sequence[SourceRecord]
) -> RunOrder:
    """The order that the checkpoint in `folder` records; `sources` are the data sets found now.

    Raises:
        CheckpointError: the checkpoint is older than such records, and its data set is not found.
    """
    progress, data = manifest.progress, manifest.config.data
    segments = progress.segments
    if not segments:
        own = [s for s in sources if s.fingerprint == progress.data_fingerprint]
        if not own:
            raise CheckpointError(
                f"{folder}: was trained on another data set (fingerprint "
                f"{progress.data_fingerprint}) than {', '.join(s.path for s in sources)} now "
                "holds; restore the data, or train in another run folder (training.run_dir=…)"
            )
        # As it was recorded when it was the run's only one, whatever stands beside it now.
        alone = replace(own[0], weight=1.0, max_epochs=None, taken=0, order_key="")
        segments = (first_segment([alone], global_batch_size=progress.global_batch_size),)
    return RunOrder(segments, seed=data.seed, shuffle=data.shuffle)
