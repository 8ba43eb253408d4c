"""A packed data set: every file on its own compressed by zstd, for a journey or a cold store.

    PACKED/
        train-00000.arrow.zst …  one zstd frame a file, with its size and zstd's own checksum
        manifest.json.zst        after all other files
        packed.json              written last: name, bytes and hashes of every file, packed size

A packed data set is never read in place: compressed buffers inside the Arrow files were measured to
make random reads 1,500 times slower. There is no manifest.json in it, so nothing takes it for a
data set.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

from mamba_dist.data.document_ids import DOCUMENT_IDS_NAME
from mamba_dist.data.durable import FileHashes, RunningHashes, new_folder, write_durably
from mamba_dist.data.manifest import (
    BAD_DOCUMENTS_NAME,
    INPUTS_NAME,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
)
from mamba_dist.data.shard_index import INDEX_NAME
from mamba_dist.errors import DataError

PACKED_NAME = "packed.json"
PACKED_FORMAT_VERSION = 1
LEVELS = range(1, 23)
_SUFFIX = ".zst"
_BLOCK_BYTES = 1 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class PackedFile:
    """One file of a data set as it was, and the size of its archive."""

    name: str
    bytes: int
    xxh3: str
    sha256: str
    packed_bytes: int

    @property
    def archive(self) -> str:
        """Name of the compressed file."""
        return self.name + _SUFFIX


@dataclass(frozen=True)
class PackedDataset:
    """The content of packed.json."""

    fingerprint: str
    files: tuple[PackedFile, ...]

    @property
    def bytes(self) -> int:
        """Size of the data set."""
        return sum(file.bytes for file in self.files)

    @property
    def packed_bytes(self) -> int:
        """Size of the archives."""
        return sum(file.packed_bytes for file in self.files)


def dataset_files(manifest: Manifest) -> list[str]:
    """The names of all files of a data set, the manifest last."""
    names = [shard.file for shard in manifest.shards]
    names += [DOCUMENT_IDS_NAME] if manifest.inputs.ids_sha256 is not None else []
    names += [manifest.tokenizer.file, INPUTS_NAME, BAD_DOCUMENTS_NAME]
    index = [] if manifest.index.sha256 is None else [INDEX_NAME]
    return [*names, *index, MANIFEST_NAME]


def pack_dataset(
    folder: Path, output: Path, *, level: int, threads: int, advance: Advance
) -> PackedDataset:
    """Packs a data set into a new folder; `advance` hears of bytes of the data set as they go.

    Raises:
        DataError: the data set is damaged or incomplete, `output` exists, or the disk is full.
    """
    manifest = read_manifest(folder)
    known = _known_hashes(manifest)
    with _explained(output), new_folder(output) as staging:
        files = []
        for name in dataset_files(manifest):
            packed = _pack_file(
                folder / name, staging, level=level, threads=threads, advance=advance
            )
            _check_against(known, packed, f"{folder / name} is damaged and was not packed")
            files.append(packed)
        result = PackedDataset(manifest.fingerprint, tuple(files))
        content = {"format_version": PACKED_FORMAT_VERSION, **asdict(result)}
        write_durably(staging / PACKED_NAME, (json.dumps(content, indent=1) + "\n").encode())
    return result


def unpack_dataset(
    packed: Path, output: Path, *, index: PackedDataset, advance: Advance
) -> Manifest:
    """Unpacks the data set at `packed` into a new folder, every byte and hash as it was; `index`
    is its packed.json, `advance` hears of unpacked bytes.

    Raises:
        DataError: an archive is damaged or missing, `output` exists, or the disk is full.
    """
    with _explained(output), new_folder(output) as staging:
        for file in index.files:
            _unpack_file(packed, staging, file, advance=advance)
        manifest = read_manifest(staging)
        if manifest.fingerprint != index.fingerprint or dataset_files(manifest) != [
            file.name for file in index.files
        ]:
            raise DataError(f"{packed / PACKED_NAME} belongs to another data set; pack it again")
        known = _known_hashes(manifest)
        for file in index.files:
            _check_against(known, file, f"{packed / file.archive} is of another data set")
    return manifest


def read_packed(folder: Path) -> PackedDataset:
    """The packed.json of a folder.

    Raises:
        DataError: there is none, it is damaged, or of a newer format.
    """
    path = folder / PACKED_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != PACKED_FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version}, this program reads "
                f"{PACKED_FORMAT_VERSION}; update the program"
            )
        files = tuple(PackedFile(**file) for file in content["files"])
        if any(Path(file.name).name != file.name for file in files):
            raise ValueError("a file name leads out of the folder")
        return PackedDataset(str(content["fingerprint"]), files)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no {PACKED_NAME}, so it is no (whole) packed data set; copy it again, "
            "or pack one by `python tools/pack_shards.py pack DATASET OUT`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy or pack it again"
        ) from error


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: {error.strerror or error}; mend that and try again, "
            f"nothing was left in {output}"
        ) from error


def _pack_file(
    source: Path, staging: Path, *, level: int, threads: int, advance: Advance
) -> PackedFile:
    target = staging / (source.name + _SUFFIX)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, threads=threads, write_checksum=True, write_content_size=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    hashes = RunningHashes()
    with source.open("rb") as plain, target.open("wb") as stream:
        size = os.fstat(plain.fileno()).st_size
        try:
            with compressor.stream_writer(stream, size=size, closefd=False) as writer:
                while block := plain.read(_BLOCK_BYTES):
                    hashes.update(block)
                    writer.write(block)
                    advance(len(block))
        except zstandard.ZstdError as error:
            raise DataError(f"{source} changed while it was read ({error}); let it rest") from error
        stream.flush()
        os.fsync(stream.fileno())
    return PackedFile(source.name, *_fields(hashes.result()), target.stat().st_size)


def _unpack_file(packed: Path, staging: Path, file: PackedFile, *, advance: Advance) -> None:
    source = packed / file.archive
    if not source.is_file():
        raise DataError(f"{source} is missing; copy it again")
    if (size := source.stat().st_size) != file.packed_bytes:
        raise DataError(
            f"{source} is {'truncated' if size < file.packed_bytes else 'too long'}: it has {size} "
            f"bytes, {PACKED_NAME} says {file.packed_bytes}; copy it again"
        )
    hashes = RunningHashes()
    with source.open("rb") as stream, (staging / file.name).open("wb") as target:
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(stream)
            while hashes.bytes <= file.bytes and (block := reader.read(_BLOCK_BYTES)):
                hashes.update(block)
                target.write(block)
                advance(len(block))
        except zstandard.ZstdError as error:
            raise DataError(f"{source} is damaged ({error}); copy it again") from error
        target.flush()
        os.fsync(target.fileno())
    if _fields(hashes.result()) != (file.bytes, file.xxh3, file.sha256):
        raise DataError(
            f"{source} is damaged: it unpacks to {hashes.bytes} bytes of xxh3 "
            f"{hashes.result().xxh3}, {PACKED_NAME} says {file.bytes} of {file.xxh3}; copy it again"
        )


def _fields(hashes: FileHashes) -> tuple[int, str, str]:
    return hashes.bytes, hashes.xxh3, hashes.sha256


def _known_hashes(manifest: Manifest) -> dict[str, str]:
    """By name, the sha256 of each file of which the manifest says it."""
    known = {shard.file: shard.sha256 for shard in manifest.shards}
    known[manifest.tokenizer.file] = manifest.tokenizer.sha256
    known[INPUTS_NAME] = manifest.inputs.sha256
    if manifest.inputs.ids_sha256 is not None:
        known[DOCUMENT_IDS_NAME] = manifest.inputs.ids_sha256
    if manifest.index.sha256 is not None:
        known[INDEX_NAME] = manifest.index.sha256
    return known


def _check_against(known: Mapping[str, str], file: PackedFile, fault: str) -> None:
    """Nothing, if a file is what the manifest says, where it says anything."""
    if known.get(file.name, file.sha256) != file.sha256:
        raise DataError(
            f"{fault}: its sha256 is {file.sha256}, the manifest says {known[file.name]}; see "
            "tools/verify_shards.py"
        )
