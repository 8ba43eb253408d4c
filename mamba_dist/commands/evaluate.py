"""tools/evaluate.py: validation loss of a run's newest checkpoint, beside n-gram baselines.

With --baselines the run folder gets summary.json: losses in nats per token, on the same validation
labels for the model and the baselines. `bigram_loss` is fitted on exactly the tokens that the model
was trained on, `bigram_full_loss` on the whole training split.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mamba_dist.checkpoint.history import recorded_order
from mamba_dist.checkpoint.reader import CheckpointReader, open_checkpoint
from mamba_dist.commands.arguments import positive_int
from mamba_dist.config.schema import RunConfig
from mamba_dist.config.text import write_text
from mamba_dist.data.batch import IGNORED_LABEL, Batch, SampleId, pack
from mamba_dist.data.loader import ValidationLoader
from mamba_dist.data.ngram import NgramCounts, baseline_losses, count_ngrams
from mamba_dist.data.samples import Samples, training_samples
from mamba_dist.data.segments import SourceRecord
from mamba_dist.data.training_sources import (
    TrainingSource,
    source_records,
    sources_fingerprint,
)
from mamba_dist.errors import CheckpointError, MambaDistError
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.weights import load_parameters
from mamba_dist.ops.backend import resolve_backend
from mamba_dist.telemetry.metrics import read_metrics
from mamba_dist.telemetry.progress import progress
from mamba_dist.train.build import open_matching_sources
from mamba_dist.train.evaluate import label_count, model_inputs

EXIT_USER_ERROR = 2
SUMMARY_FILE = "summary.json"
_ROWS_PER_READ = 64
_FINAL_RECORDS = 5

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Summary:
    """How a run ended; losses in nats per token."""

    train_loss: float | None
    """Mean over the last records of metrics.jsonl."""
    val_loss: float
    unigram_loss: float
    bigram_loss: float
    bigram_full_loss: float
    tokens: int
    """Labels that the model was trained on."""
    val_tokens: int
    seconds: float
    """Wall time of training and of the validations during it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parser().parse_args(argv)
    try:
        run_dir = Path(arguments.run)
        reader = open_checkpoint(run_dir, notice=lambda text: print(text, file=sys.stderr))
        if arguments.baselines and run_dir == reader.folder:
            raise CheckpointError(
                f"{run_dir}: is one checkpoint; --baselines writes summary.json into a run folder, "
                "name that"
            )
        sources = open_matching_sources(reader.config)
        _require_trained_on(sources, reader)
        # Validation is concat, so that only the baselines may need a plan: now, not in the end.
        records = source_records(sources, reader.config.data) if arguments.baselines else ()
        batches = _validation(reader.config, sources, max_sequences=arguments.max_sequences)
        loss, tokens = _validation_loss(reader, batches)
        print(f"step {reader.step}: validation loss {loss:.4f} over {tokens:,} tokens")
        if arguments.baselines:
            summary = _summary(
                run_dir, reader, list(zip(sources, records, strict=True)), batches, val_loss=loss
            )
            write_text(json.dumps(asdict(summary), indent=2) + "\n", run_dir / SUMMARY_FILE)
            _print_summary(summary)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/evaluate.py", description="Validation loss of a run's newest checkpoint."
    )
    parser.add_argument("run", help="run folder, for example runs/quickstart")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also fit unigram and bigram baselines, and write summary.json into the run folder",
    )
    parser.add_argument(
        "--max-sequences", type=positive_int, default=256, help="validation sequences; default 256"
    )
    return parser


def _require_trained_on(sources: Sequence[TrainingSource], reader: CheckpointReader) -> None:
    trained_on, now = reader.manifest.progress.data_fingerprint, sources_fingerprint(sources)
    if now != trained_on:
        paths = ", ".join(str(source.dataset.path) for source in sources)
        raise CheckpointError(
            f"{reader.folder}: was trained on another data set (fingerprint {trained_on}) than "
            f"{paths} holds now ({now}); restore the data"
        )


def _validation(
    config: RunConfig, sources: Sequence[TrainingSource], *, max_sequences: int
) -> list[Batch]:
    loader = ValidationLoader(
        sources,
        config.data,
        micro_batch_size=config.training.micro_batch_size,
        max_sequences=max_sequences,
        rank=0,
        world_size=1,
        pad_token_id=config.model.pad_token_id,
    )
    return list(loader)


@torch.no_grad()
def _validation_loss(reader: CheckpointReader, batches: Sequence[Batch]) -> tuple[float, int]:
    config = reader.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        backend = resolve_backend(config.engine.ops_backend, device_type=device.type)
        model = MambaLM(config.model, backend=backend).eval()
    load_parameters(model, reader.read_parameters())
    loss_sum, tokens = 0.0, 0
    bf16 = config.training.precision == "bf16"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        progress(len(batches), "batches", description="validation") as bar,
    ):
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}
            loss_sum += float(model(**inputs))
            tokens += label_count(batch)
            bar.advance()
    return loss_sum / tokens, tokens


def _summary(
    run_dir: Path,
    reader: CheckpointReader,
    sources: Sequence[tuple[TrainingSource, SourceRecord]],
    batches: Sequence[Batch],
    *,
    val_loss: float,
) -> Summary:
    vocab_size, data = reader.config.model.vocab_size, reader.config.data
    records = [record for _, record in sources]
    everything = (
        SampleId(source, number)
        for source, record in enumerate(records)
        for number in range(record.samples)
    )
    opened = [
        training_samples(source.dataset, packing=data.packing, length=data.sequence_length)
        for source, _ in sources
    ]
    val_pairs = [(b.input_ids.numpy(), b.labels.numpy()) for b in batches]

    def counts(samples: Iterator[SampleId]) -> NgramCounts:
        return count_ngrams(_pairs(opened, samples), vocab_size=vocab_size)

    fitted = baseline_losses(counts(_trained_samples(reader, records)), val_pairs)
    full = baseline_losses(counts(everything), val_pairs)
    train_loss, seconds = _training_history(run_dir)
    return Summary(
        train_loss=train_loss,
        val_loss=val_loss,
        unigram_loss=fitted.unigram,
        bigram_loss=fitted.bigram,
        bigram_full_loss=full.bigram,
        tokens=reader.manifest.progress.trained_tokens,
        val_tokens=fitted.tokens,
        seconds=seconds,
    )


def _trained_samples(
    reader: CheckpointReader, records: Sequence[SourceRecord]
) -> Iterator[SampleId]:
    """Every sample that the run has read, those of skipped steps included, by place in `records`.

    Raises:
        CheckpointError: the run also read data sets that have left the mixture.
    """
    order = recorded_order(reader.manifest, folder=reader.folder, sources=records)
    place = {record.fingerprint: index for index, record in enumerate(records)}
    gone = {s.path for one in order.segments for s in one.sources if s.fingerprint not in place}
    if gone:
        raise CheckpointError(
            f"{reader.folder}: the run also read {', '.join(sorted(gone))}, no longer in its "
            "mixture; baselines are fitted on all that was read, leave --baselines out"
        )
    for position in range(reader.manifest.progress.next_sample):
        sample = order.locate(position)
        source = order.segments[sample.segment].sources[sample.source]
        yield SampleId(place[source.fingerprint], sample.number)


def _pairs(sources: Sequence[Samples], samples: Iterator[SampleId]) -> Pairs:
    while some := list(islice(samples, _ROWS_PER_READ)):
        rows = pack(sources, some, pad_token_id=IGNORED_LABEL)
        yield rows.input_ids, rows.labels


def _training_history(run_dir: Path) -> tuple[float | None, float]:
    """Mean loss of the last training records, and seconds spent; a repeated step counts once."""
    records = {
        (r["step"], "loss" in r): r for r in read_metrics(run_dir) if "rolled_back_from" not in r
    }
    training = [r for (_, is_training), r in sorted(records.items()) if is_training]
    seconds, before = 0.0, 0.0
    for record in training:
        seconds += (record["step_s"] or 0.0) * ((record["step"] or 0.0) - before)
        before = record["step"] or 0.0
    seconds += sum(
        r["seconds"] or 0.0 for (_, is_training), r in records.items() if not is_training
    )
    losses = [r["loss"] for r in training[-_FINAL_RECORDS:] if r["loss"] is not None]
    return (sum(losses) / len(losses) if losses else None), seconds


def _print_summary(summary: Summary) -> None:
    rows = {
        "training loss (last records)": summary.train_loss,
        "validation loss": summary.val_loss,
        "unigram, fitted on the trained tokens": summary.unigram_loss,
        "Witten-Bell bigram, fitted on the trained tokens": summary.bigram_loss,
        "Witten-Bell bigram, whole training split": summary.bigram_full_loss,
    }
    print(f"\nnats per token after {summary.tokens:,} tokens, {summary.seconds:.0f} s of training")
    for name, loss in rows.items():
        print(f"  {name:50}{'none' if loss is None else f'{loss:7.4f}'}")
    gain = summary.unigram_loss - summary.val_loss
    beaten = "below" if summary.val_loss < summary.bigram_loss else "NOT below"
    print(f"the model is {gain:.2f} nats below the unigram and {beaten} the bigram\n")
