"""tools/which_docs.py: which documents stand at a place of a data set, and where they came from.

The samples that a training log names ("samples 128 to 191") are positions in the run's order, from
its first sample; a sample id (`Batch.sample_ids`) is a sample of the split under the run's packing.
The first needs the run's config, which has the seed.

Exit codes: 0 done; 2 a mistake that the message explains; anything else is a crash.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from mamba_dist.commands.arguments import not_negative_int, positive_int
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import DataConfig, Packing
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.document_ids import find_document_id
from mamba_dist.data.lookup import DocumentPlace, InputIndex, SplitIndex, find_document
from mamba_dist.data.manifest import SPLITS, Manifest
from mamba_dist.data.order import SampleOrder
from mamba_dist.data.samples import Samples, training_samples, validation_samples
from mamba_dist.data.tokenization import Tokenizer, check_tokenizer
from mamba_dist.errors import DataError, MambaDistError

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.samples is not None and (arguments.config is None or arguments.split != "train"):
        parser.error("--samples needs --config, the run's config.yaml, and the split train")
    if arguments.sample_id is not None and not (arguments.sequence_length or arguments.config):
        parser.error("--sample-id needs --sequence-length, or --config")
    try:
        _Answer(arguments).print()
    except MambaDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


class _Answer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._folder: Path = arguments.dataset
        self._dataset = open_dataset(self._folder)
        self._manifest: Manifest = self._dataset.manifest
        self._index = SplitIndex(self._folder, self._manifest, arguments.split)
        self._inputs = InputIndex(self._folder)
        self._tokenizer: Tokenizer = check_tokenizer(
            self._manifest, self._folder / self._manifest.tokenizer.file
        )

    def print(self) -> None:
        asked = self._arguments
        if asked.doc_id is not None:
            place = find_document(self._folder, self._manifest, asked.doc_id)
            self._index = SplitIndex(self._folder, self._manifest, place.split)
            self._print_places([place])
        elif asked.position is not None:
            self._print_places(self._index.between(asked.position, asked.position + 1))
        elif asked.sample_id is not None:
            self._print_sample(self._samples(), asked.sample_id)
        else:
            self._print_samples(asked.samples)

    def _data_config(self) -> DataConfig:
        return load_config(self._arguments.config).config.data

    def _samples(self) -> Samples:
        asked = self._arguments
        data = DataConfig() if asked.config is None else self._data_config()
        length = asked.sequence_length or data.sequence_length
        if asked.split != "train":
            return validation_samples(self._dataset, length)
        return training_samples(self._dataset, packing=asked.packing or data.packing, length=length)

    def _print_samples(self, numbers: range) -> None:
        data, samples = self._data_config(), self._samples()
        order = SampleOrder(len(samples), data.seed, data.shuffle)
        for number in numbers:
            epoch, sample = order.locate(number)
            print(f"sample {number} of the run: epoch {epoch}, sample id {sample}")
            self._print_sample(samples, sample)

    def _print_sample(self, samples: Samples, sample: int) -> None:
        if not 0 <= sample < len(samples):
            raise DataError(
                f"there is no sample id {sample}: at a sequence length of {samples.length} the "
                f"{self._arguments.split} split has {len(samples)}, from 0"
            )
        for span in samples.spans(sample):
            # One token more than the inputs: the label of the last.
            stop = min(span.start + span.length + 1, self._index.tokens)
            print(
                f"sample id {sample}: tokens {span.start} to {stop - 1} of {self._arguments.split}"
            )
            self._print_places(self._index.between(span.start, stop))

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
        most = self._arguments.tokens
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
    parser.add_argument("dataset", type=Path, help="data set folder")
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
    parser.add_argument("--split", choices=SPLITS, default="train", help="default train")
    parser.add_argument(
        "--sequence-length", type=positive_int, metavar="L", help="default: the config's"
    )
    parser.add_argument(
        "--packing", choices=get_args(Packing), help="default: the config's, or concat"
    )
    parser.add_argument("--config", type=Path, help="the run's config.yaml")
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
