"""tools/which_docs.py: which documents stand at a place of a data set, and where they came from.

The samples that a training log names ("samples 128 to 191") are positions in the run's order, from
its first sample; its steps count from 1. Both need the run: its folder, or its config.yaml. A
sample id is a sample of a split under the run's packing.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.commands.run_samples import CONFIG_FILE, RunSamples
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import DataConfig, Packing
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.document_ids import find_document_id
from mamba_dist.data.lookup import DocumentPlace, InputIndex, SplitIndex, find_document
from mamba_dist.data.manifest import Manifest
from mamba_dist.data.samples import Samples, training_samples, validation_samples
from mamba_dist.data.shard_index import SPLITS
from mamba_dist.data.tokenization import Tokenizer, check_tokenizer
from mamba_dist.errors import DataError, MambaDistError

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_question(parser, arguments)
    try:
        if arguments.samples is None and arguments.step is None:
            _print_place(arguments)
        else:
            _print_samples(arguments)
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _check_question(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.samples is not None or arguments.step is not None:
        if arguments.config is None or arguments.split != "train":
            parser.error("--samples and --step need --config, the run, and the split train")
        if arguments.sequence_length is not None or arguments.packing is not None:
            parser.error("--samples and --step take the run's own sequence length and packing")
    elif len(arguments.dataset) != 1:
        parser.error(f"a place in a data set needs one DATASET, found {len(arguments.dataset)}")
    elif arguments.sample_id is not None and not (arguments.sequence_length or arguments.config):
        parser.error("--sample-id needs --sequence-length, or --config")


def _print_place(arguments: argparse.Namespace) -> None:
    [folder] = arguments.dataset
    documents = _Documents(folder, arguments.split, shown_tokens=arguments.tokens)
    if arguments.doc_id is not None:
        documents.print_document(arguments.doc_id)
    elif arguments.position is not None:
        documents.print_tokens(arguments.position, arguments.position + 1)
    else:
        data = DataConfig()
        if arguments.config is not None:
            named: Path = arguments.config
            path = named / CONFIG_FILE if named.is_dir() else named
            data = load_config(path).config.data
        documents.print_sample(
            arguments.sample_id,
            packing=arguments.packing or data.packing,
            length=arguments.sequence_length or data.sequence_length,
        )


def _print_samples(arguments: argparse.Namespace) -> None:
    run = RunSamples(arguments.config, arguments.dataset)
    samples: range = arguments.samples
    if arguments.step is not None:
        samples = run.positions(arguments.step)
    if run.recorded_samples is not None and samples.stop > run.recorded_samples:
        print(
            f"note: the newest checkpoint is of step {run.recorded_steps}; from sample "
            f"{run.recorded_samples} on, this is what the run reads unless the mixture or the "
            "batch size was changed since",
            file=sys.stderr,
        )
    if arguments.step is not None:
        print(f"step {arguments.step}: samples {samples.start} to {samples.stop - 1} of the run")
    opened: dict[Path, _Documents] = {}
    for position in samples:
        found = run.find(position)
        if found.folder not in opened:
            opened[found.folder] = _Documents(
                found.folder, arguments.split, shown_tokens=arguments.tokens
            )
        source = f"{found.folder}, " if run.is_mixture else ""
        print(
            f"sample {position} of the run: {source}epoch {found.epoch}, sample id {found.number}"
        )
        opened[found.folder].print_sample(
            found.number, packing=run.data.packing, length=run.data.sequence_length
        )


class _Documents:
    """The documents of one data set, printed with their input files and first tokens."""

    def __init__(self, folder: Path, split: str, *, shown_tokens: int) -> None:
        self._folder = folder
        self._shown_tokens = shown_tokens
        self._dataset = open_dataset(folder)
        self._manifest: Manifest = self._dataset.manifest
        self._index = SplitIndex(folder, self._manifest, split)
        self._inputs = InputIndex(folder)
        self._tokenizer: Tokenizer = check_tokenizer(
            self._manifest, folder / self._manifest.tokenizer.file
        )

    def print_document(self, doc_id: int) -> None:
        place = find_document(self._folder, self._manifest, doc_id)
        self._index = SplitIndex(self._folder, self._manifest, place.split)
        self._print_places([place])

    def print_tokens(self, start: int, stop: int) -> None:
        self._print_places(self._index.between(start, stop))

    def print_sample(self, sample: int, *, packing: Packing, length: int) -> None:
        split = self._index.split
        samples: Samples = (
            training_samples(self._dataset, packing=packing, length=length)
            if split == "train"
            else validation_samples(self._dataset, length)
        )
        if not 0 <= sample < len(samples):
            raise DataError(
                f"there is no sample id {sample}: at a sequence length of {length} the "
                f"{split} split has {len(samples)}, from 0"
            )
        for span in samples.spans(sample):
            # One token more than the inputs: the label of the last.
            stop = min(span.start + span.length + 1, self._index.tokens)
            print(f"sample id {sample}: tokens {span.start} to {stop - 1} of {split}")
            self.print_tokens(span.start, stop)

    def _print_places(self, places: Iterable[DocumentPlace]) -> None:
        for place in places:
            source = self._inputs.find(place.doc_id)
            known_as = self._id_in_source(place.doc_id)
            print(
                f"doc_id {place.doc_id}{known_as}: {place.tokens} tokens from {source.name}, "
                f"document {source.number + 1} of its {source.documents}"
            )
            print(
                f"    {place.shard}, batch {place.batch}, row {place.row}, token "
                f"{place.shard_position} of the shard, {place.position} of {place.split}"
            )
            self._print_beginning(place)

    def _id_in_source(self, doc_id: int) -> str:
        if self._manifest.inputs.ids_sha256 is None:
            return ""
        found = find_document_id(self._folder, doc_id)
        return f" (id {found!r} in its source)" if found is not None else ""

    def _print_beginning(self, place: DocumentPlace) -> None:
        most = self._shown_tokens
        if most == 0:
            return
        text = self._tokenizer.decode(self._index.read(place, most=most).tolist())
        print(f"    {text!r}{' …' if place.tokens > most else ''}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/which_docs.py",
        description="Say which documents stand at a place of a data set, from which input file "
        "each came, and how it begins.",
    )
    parser.add_argument(
        "dataset",
        type=Path,
        nargs="*",
        help="data set folder; with --samples or --step only where it is not where the run read it",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--doc-id", type=not_negative_int, metavar="N", help="a document's number")
    place.add_argument(
        "--position", type=not_negative_int, metavar="P", help="a token of the split, from 0"
    )
    place.add_argument(
        "--sample-id", type=not_negative_int, metavar="W", help="a sample of the split, from 0"
    )
    place.add_argument(
        "--samples",
        type=_range,
        metavar="FIRST-LAST",
        help="samples of a run as its log names them; needs --config",
    )
    place.add_argument(
        "--step",
        type=positive_int,
        metavar="N",
        help="all samples of an optimizer step, from 1, of a run; needs --config",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="default train")
    parser.add_argument(
        "--sequence-length", type=positive_int, metavar="L", help="default: the config's"
    )
    parser.add_argument(
        "--packing", choices=get_args(Packing), help="default: the config's, or concat"
    )
    parser.add_argument("--config", type=Path, help="run folder, or a config.yaml")
    parser.add_argument(
        "--tokens",
        type=not_negative_int,
        default=40,
        help="show the first tokens of each document, decoded; default 40, 0 for none",
    )
    return parser


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    samples = range(int(first), int(last or first) + 1)
    if not samples:
        raise argparse.ArgumentTypeError(f"{text} is no range; give FIRST-LAST, as in 128-191")
    return samples
