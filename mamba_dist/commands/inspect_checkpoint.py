"""tools/inspect_checkpoint.py: what a checkpoint holds, whether it is whole, what differs in two.

Exit codes: 0 done, whole, or of the same training state; 1 damaged, or of another state; 2 a
mistake that the message explains; anything else is a crash.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mamba_dist.checkpoint.comparison import (
    FieldDifference,
    StateDifference,
    field_differences,
    require_comparable,
    state_differences,
)
from mamba_dist.checkpoint.inspection import (
    ParameterStatistics,
    find_folder,
    open_sized,
    parameter_count,
    parameter_statistics,
    segment_descriptions,
    source_cursors,
    state_bytes,
)
from mamba_dist.checkpoint.layout import MANIFEST
from mamba_dist.checkpoint.manifest import CheckpointManifest, read_manifest
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.checkpoint.verification import checkpoint_damage
from mamba_dist.commands.arguments import not_negative_int
from mamba_dist.config.report import shown
from mamba_dist.config.schema import MambaConfig
from mamba_dist.config.text import write_text
from mamba_dist.errors import CheckpointError, MambaDistError
from mamba_dist.telemetry.progress import progress

EXIT_DAMAGED_OR_DIFFERENT = 1
EXIT_USER_ERROR = 2
_FINGERPRINT_LETTERS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    arguments = _parsed(argv)
    try:
        return _run(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(arguments: argparse.Namespace) -> int:
    folders = [
        find_folder(
            path,
            step=arguments.step,
            whole=not arguments.verify,
            notice=lambda text: print(text, file=sys.stderr),
        )
        for path in arguments.checkpoints
    ]
    if len(folders) == 2:
        report, code = _compare(*(open_sized(folder) for folder in folders))
    elif arguments.verify:
        report, code = _verify(folders[0])
    else:
        report, code = _describe(open_sized(folders[0])), 0
    if arguments.parameters and not code:
        report["parameters"] = _measure(CheckpointReader(folders[0]))
    if arguments.json is not None:
        write_text(json.dumps(_strict(report), indent=2) + "\n", arguments.json)
    return code


def _describe(reader: CheckpointReader) -> dict[str, Any]:
    _print_description(reader.folder, reader.manifest)
    return _description(reader.folder, reader.manifest)


def _description(folder: Path, manifest: CheckpointManifest) -> dict[str, Any]:
    body = manifest.model_dump(mode="json", exclude={"fragments", "shapes"})
    # Without the segments, which stand below as the steps that they are.
    body["progress"].pop("segments")
    return {
        "folder": str(folder),
        **body,
        "parameter_count": parameter_count(manifest),
        "segments": [asdict(segment) for segment in segment_descriptions(manifest)],
        "cursors": [asdict(cursor) for cursor in source_cursors(manifest)],
    }


def _print_description(folder: Path, manifest: CheckpointManifest) -> None:
    at = manifest.progress
    print(folder)
    print(f"  step        {at.step:>18,}  optimizer steps, {manifest.adam_steps:,} of them updates")
    print(f"  tokens      {at.trained_tokens:>18,}  trained on")
    print(f"  samples     {at.next_sample:>18,}  read, {at.global_batch_size:,} a step")
    if manifest.saved_at is not None:
        print(f"  saved       {_moment(manifest.saved_at):>18}  by the clock of rank 0, in UTC")
    if manifest.val_loss is not None:
        print(f"  validation  {manifest.val_loss:>18.6f}  nats per token")
    versions = ", ".join(f"{name} {number}" for name, number in sorted(manifest.versions.items()))
    print(f"  written by  {manifest.engine} on {_counted(manifest.world_size, 'rank')}")
    print(f"  versions    {versions or 'not recorded'}")
    print(f"  model       {_sizes(manifest.config.model)}")
    print(f"  parameters  {parameter_count(manifest):>18,}  in {len(manifest.shapes):,} tensors")
    tokenizer = manifest.tokenizer
    print(f"  tokenizer   sha256 {_short(tokenizer.sha256)}, EOS {tokenizer.eos_token}")
    _print_data(manifest)
    print("\nfiles")
    for record in manifest.files:
        print(f"  {record.size_bytes:>18,}  bytes  {record.name}")
    print(f"  {(folder / MANIFEST).stat().st_size:>18,}  bytes  {MANIFEST}")


def _print_data(manifest: CheckpointManifest) -> None:
    print(f"\ndata, fingerprint {_short(manifest.progress.data_fingerprint)}")
    for segment in segment_descriptions(manifest):
        sources = ", ".join(
            f"{100 * s.share:.4g} % {s.path} ({_short(s.fingerprint)})" for s in segment.sources
        )
        # Counted from 1, as a log does.
        end = "on" if segment.end_step is None else f"to {segment.end_step:,}"
        print(
            f"  step {segment.first_step + 1:,} {end}, sample {segment.first_sample:,} on: "
            f"batches of {segment.global_batch_size:,}, {sources}"
        )
    for cursor in source_cursors(manifest):
        print(
            f"  read of {cursor.path} ({_short(cursor.fingerprint)}): {cursor.samples_read:,} "
            f"samples, {100 * cursor.epoch_share:.4g} % of epoch {cursor.epoch:,}"
            + (", exhausted" if cursor.exhausted else "")
        )
    if not manifest.progress.segments:
        print("  one data set, whose size is not recorded: the checkpoint is older than mixtures")


def _verify(folder: Path) -> tuple[dict[str, Any], int]:
    damaged: list[dict[str, str]] = []
    report: dict[str, Any] = {"folder": str(folder), "damaged": damaged}
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        if not any(folder.glob("rank-*.safetensors")) and not (folder / MANIFEST).exists():
            raise
        damaged.append({"file": MANIFEST, "fault": str(error)})
        print(error)
        print("error: without its manifest no other file can be checked", file=sys.stderr)
        return report, EXIT_DAMAGED_OR_DIFFERENT
    report.update(_description(folder, manifest))
    _print_description(folder, manifest)
    print()
    total = sum(record.size_bytes for record in manifest.files)
    with progress(total, "B", description="verifying") as bar:
        for damage in checkpoint_damage(folder, manifest, advance=bar.advance):
            damaged.append({"file": damage.path.name, "fault": damage.fault})
            bar.show(str(damage))
    if damaged:
        files = len({damage["file"] for damage in damaged})
        print(
            f"error: {_counted(len(damaged), 'fault')} in {_counted(files, 'file')} of {folder}, "
            "listed above; use another checkpoint, or restore these files",
            file=sys.stderr,
        )
        return report, EXIT_DAMAGED_OR_DIFFERENT
    print(
        f"whole: {_counted(len(manifest.files), 'file')} and {MANIFEST} hash to what was written, "
        "every element of every parameter is there once"
    )
    return report, 0


def _measure(reader: CheckpointReader) -> list[dict[str, Any]]:
    with progress(state_bytes(reader.manifest), "B", description="reading") as bar:
        rows = list(parameter_statistics(reader, advance=bar.advance))
    width = max(len(row.name) for row in rows)
    print(
        f"\n{'parameter':<{width}}  {'shape':>15}  {'dtype':<8}  {'norm':>10}  "
        f"{'exp_avg':>10}  {'exp_avg_sq':>10}  not finite"
    )
    for row in rows:
        shape = "x".join(str(size) for size in row.shape)
        print(
            f"{row.name:<{width}}  {shape:>15}  {row.dtype:<8}  "
            f"{'  '.join(f'{_norm(norm):>10}' for norm in row.norms.values())}  {_not_finite(row)}"
        )
    return [asdict(row) for row in rows]


def _compare(first: CheckpointReader, second: CheckpointReader) -> tuple[dict[str, Any], int]:
    require_comparable(first, second)
    fields = field_differences(first.manifest, second.manifest)
    print(f"- {first.folder}\n+ {second.folder}")
    for field in fields:
        print(f"  {field.name}: {shown(field.first)} -> {shown(field.second)}")
    with progress(state_bytes(first.manifest), "B", description="comparing") as bar:
        states = state_differences(first, second, advance=bar.advance)
    _print_states(states)
    different = bool(states) or any(field.is_state for field in fields)
    print(f"\n{_verdict(fields, states, parameters=len(first.manifest.shapes))}")
    report = {
        "first": str(first.folder),
        "second": str(second.folder),
        "same_state": not different,
        "fields": [asdict(field) for field in fields],
        "states": [asdict(state) for state in states],
    }
    return report, EXIT_DAMAGED_OR_DIFFERENT if different else 0


def _print_states(states: Sequence[StateDifference]) -> None:
    if not states:
        return
    width = max(len(state.name) for state in states)
    print(
        f"\n{'parameter':<{width}}  {'state':<10}  {'max |diff|':>10}  {'rel. L2':>10}  "
        "elements that differ"
    )
    for state in states:
        print(
            f"{state.name:<{width}}  {state.kind:<10}  {state.max_difference:>10.3e}  "
            f"{state.relative_l2:>10.3e}  {state.differing:,} of {state.numel:,}"
        )


def _verdict(
    fields: Sequence[FieldDifference], states: Sequence[StateDifference], *, parameters: int
) -> str:
    changed = len({state.name for state in states})
    progressed = [field.name for field in fields if field.is_state]
    if not changed and not progressed:
        return f"equal: {parameters:,} parameters and their moments bit for bit, and the progress"
    told = [f"{changed:,} of {parameters:,} parameters" if changed else "", *progressed]
    return "different: " + ", ".join(text for text in told if text)


def _sizes(model: MambaConfig) -> str:
    sizes = (
        f"{model.layer}, {_counted(model.n_layers, 'layer')}, d_model {model.d_model}, "
        f"d_inner {model.d_inner}, d_state {model.d_state}"
    )
    if model.layer == "mamba2":
        sizes += f", {model.n_heads} heads of {model.headdim}, {model.ngroups} groups"
    tied = "tied" if model.tie_embeddings else "untied"
    return f"{sizes}, vocabulary {model.vocab_size:,} of {model.padded_vocab_size:,} rows, {tied}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _short(digest: str) -> str:
    return digest[:_FINGERPRINT_LETTERS]


def _norm(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4e}"


def _not_finite(row: ParameterStatistics) -> str:
    return f"{sum(row.non_finite.values()):>10,}"


def _strict(value: Any) -> Any:
    """With null for what is not finite, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if len(arguments.checkpoints) > 2:
        parser.error("expected one checkpoint, or two to compare")
    if len(arguments.checkpoints) == 2 and (arguments.verify or arguments.parameters):
        parser.error("--verify and --parameters take one checkpoint; two are read and checked")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/inspect_checkpoint.py",
        description="Show what a checkpoint holds, or what differs between two. Two are equal "
        "(exit code 0, else 1) if their parameters, moments, progress and tokenizer are; other "
        "configs, versions, ranks and engines are shown and do not count.",
    )
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="step-… folder, or run folder: its newest whole checkpoint (with --verify its newest)",
    )
    parser.add_argument("--step", type=not_negative_int, help="take this step of a run folder")
    parser.add_argument(
        "--parameters",
        action="store_true",
        help="a table of every parameter: norms of it and of its moments, non-finite elements",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every byte, name every damaged file; exit code 1 if there is one",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it all as JSON")
    return parser
