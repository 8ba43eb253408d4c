"""The samples of a run, from its folder or its config: which positions a step read, and of which
data set each was."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mamba_dist.checkpoint.history import recorded_order
from mamba_dist.checkpoint.layout import checkpoint_folder, committed_steps
from mamba_dist.checkpoint.manifest import CheckpointManifest, read_manifest
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import DataConfig, RunConfig
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.segments import RunOrder, SourceRecord
from mamba_dist.data.training_sources import new_run, open_sources, source_records
from mamba_dist.errors import ConfigError, DataError

CONFIG_FILE = "config.yaml"


class FoundSample(NamedTuple):
    """A sample of a run: the folder of its data set, and its number in an epoch of that."""

    folder: Path
    epoch: int
    number: int


class RunSamples:
    """The order of a run as its newest checkpoint records it, or as its config would begin it.

    `folders` are where the data sets lie now, if not where the config or the checkpoint says;
    `recorded_steps` and `recorded_samples` are how far the checkpoint goes, after which the order
    is what would come next.
    """

    def __init__(self, config_path: Path, folders: Sequence[Path]) -> None:
        config = load_config(_config_file(config_path)).config
        self._by_fingerprint = {open_dataset(folder).fingerprint: folder for folder in folders}
        checkpoint = _newest_checkpoint(config_path, config)
        self.recorded_steps: int | None = None
        self.recorded_samples: int | None = None
        if checkpoint is None:
            self.data = _with_folders(config.data, folders)
            self._fixed_batch = config.training.global_batch_size
            # Without a step that is asked for, positions mean the same in any batch size.
            sources = open_sources(self.data)
            self._order = new_run(
                sources, self.data, global_batch_size=self._fixed_batch or 1
            ).order
        else:
            folder, manifest = checkpoint
            self.recorded_steps = manifest.progress.step
            self.recorded_samples = manifest.progress.next_sample
            self.data = manifest.config.data
            self._fixed_batch = manifest.progress.global_batch_size
            self._order = _recorded(manifest, folder, folders)
        segments = self._order.segments
        self.is_mixture = len({s.fingerprint for one in segments for s in one.sources}) > 1

    def positions(self, step: int) -> range:
        """The global positions that optimizer step `step` read, counted from 1 as a log does.

        Raises:
            ConfigError: the batch size of the run is not known.
        """
        if self._fixed_batch is None:
            raise ConfigError(
                "the run has no checkpoint yet, and its config has no training.global_batch_size "
                "that would say which samples a step reads; ask by --samples"
            )
        return self._order.positions(step - 1)

    def find(self, position: int) -> FoundSample:
        """The sample at a global position.

        Raises:
            DataError: its data set is not where it was, or the run ends before.
        """
        if self._order.end is not None and position >= self._order.end:
            raise DataError(
                f"there is no sample {position}: the run's data is exhausted after "
                f"{self._order.end}, since all of data.sources have max_epochs"
            )
        sample = self._order.locate(position)
        source = self._order.segments[sample.segment].sources[sample.source]
        return FoundSample(self._folder(source), sample.epoch, sample.number)

    def _folder(self, source: SourceRecord) -> Path:
        if (known := self._by_fingerprint.get(source.fingerprint)) is not None:
            return known
        found = open_dataset(source.path).fingerprint
        if found != source.fingerprint:
            raise DataError(
                f"{source.path} holds another data set (fingerprint {found[:12]}) than the run "
                f"read there ({source.fingerprint[:12]}); give the folder where that lies now"
            )
        return self._by_fingerprint.setdefault(source.fingerprint, Path(source.path))


def _config_file(path: Path) -> Path:
    return path / CONFIG_FILE if path.is_dir() else path


def _newest_checkpoint(
    config_path: Path, config: RunConfig
) -> tuple[Path, CheckpointManifest] | None:
    beside = config_path if config_path.is_dir() else config_path.parent
    for run_dir in (beside, Path(config.training.run_dir or beside)):
        if steps := committed_steps(run_dir):
            folder = checkpoint_folder(run_dir, steps[-1])
            return folder, read_manifest(folder)
    return None


def _with_folders(data: DataConfig, folders: Sequence[Path]) -> DataConfig:
    if not folders:
        return data
    if len(folders) > 1 or len(data.all_sources) > 1:
        raise ConfigError(
            "a run without checkpoints reads the data sets of its config; leave DATASET out"
        )
    return data.model_copy(update={"dataset_path": str(folders[0]), "sources": ()})


def _recorded(manifest: CheckpointManifest, folder: Path, folders: Sequence[Path]) -> RunOrder:
    sources: Sequence[SourceRecord] = ()
    if not manifest.progress.segments:
        data = _with_folders(manifest.config.data, folders)
        sources = source_records(open_sources(data), data)
    return recorded_order(manifest, folder=folder, sources=sources)
