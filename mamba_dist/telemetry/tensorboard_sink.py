"""The records of a run as TensorBoard's scalars; apart from other sinks, which need no torch."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mamba_dist.telemetry.metrics import Record, RollbackRecord, TrainRecord

_EVENTS_ROOM_BYTES = 1 << 16


class TensorBoardSink:
    """Scalars under train/ and validation/ in the folder tensorboard/, which does not show those of
    steps that a rollback took back."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._writer: SummaryWriter | None = SummaryWriter(self._folder)

    def write(self, record: Record) -> None:
        if isinstance(record, RollbackRecord):
            self.close()
            self._writer = SummaryWriter(self._folder, purge_step=record.step + 1)
            return
        group = "train" if isinstance(record, TrainRecord) else "validation"
        if self._writer is None:
            Path(self._folder).mkdir(exist_ok=True)
            # A writer without room leaves an empty file, and a traceback of its thread.
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as probe:
                probe.write(bytes(_EVENTS_ROOM_BYTES))
            self._writer = SummaryWriter(self._folder)
        try:
            for name, value in asdict(record).items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, record.step)
        except OSError:
            # Its thread has ended and it would raise this for ever; another begins another file.
            self._writer = None
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
