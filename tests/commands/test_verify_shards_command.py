import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_dataset import MadeDataset
from old_manifest import write_version_1

from mamba_dist.commands.verify_shards import main
from mamba_dist.data import verification
from mamba_dist.data.manifest import read_manifest, write_manifest
from mamba_dist.data.shard import batch_end
from mamba_dist.data.shard_index import ShardRecord

ROOT = Path(__file__).parents[2]


def verify(
    capsys: pytest.CaptureFixture[str], made: MadeDataset, *options: str
) -> tuple[int, list[str]]:
    """The exit code, and the problems listed."""
    capsys.readouterr()
    code = main([str(made.folder), *options])
    captured = capsys.readouterr()
    assert ("error: " in captured.err) == (code == 2)
    prefix = f"{made.folder}/"
    listed = [line for line in captured.out.splitlines() if line.startswith(prefix)]
    return code, [line.removeprefix(prefix) for line in listed]


def record(made: MadeDataset, index: int = 0) -> ShardRecord:
    return read_manifest(made.folder).shards[index]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("options", [(), ("--quick",), ("--sha256",)])
def test_a_whole_data_set_is_clean(made_once: MadeDataset, options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/verify_shards.py", made_once.folder, *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("clean\n")
    assert ("GB/s" in done.stdout) == ("--quick" not in options)


def test_a_flipped_byte_anywhere_is_found_and_placed(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = record(made)
    path = made.folder / shard.file
    whole = path.read_bytes()
    ends = [batch_end(batch, "uint16") for batch in shard.batches]
    places = sorted({*range(0, len(whole), 97), 0, *ends, *(end - 1 for end in ends)})
    for at in places:
        flip(path, at)
        code, problems = verify(capsys, made)
        assert code == 2, at
        batch = int(np.searchsorted(ends, at, side="right"))
        wanted = f", batch {batch}, bytes " if batch < len(ends) else "bytes .*; its footer$"
        assert any(line.startswith(shard.file) and re.search(wanted, line) for line in problems), (
            at,
            problems,
        )
        first, last = map(int, re.search(r"bytes (\d+) to (\d+)", "\n".join(problems)).groups())  # type: ignore[union-attr]
        assert first <= at < last
        path.write_bytes(whole)
    assert verify(capsys, made) == (0, [])


def test_batches_larger_than_a_block_are_read_in_pieces(
    made: MadeDataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 50)
    assert verify(capsys, made, "--sha256") == (0, [])
    shard = record(made)
    flip(made.folder / shard.file, shard.batches[1].doc_ids_at - 1)
    code, problems = verify(capsys, made)
    assert code == 2
    assert problems[0].startswith(f"{shard.file}, batch 1, bytes ")


def test_every_problem_is_listed(made: MadeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (record(made, index) for index in range(3))
    flip(made.folder / first.file, first.batches[0].values_at)
    flip(made.folder / first.file, first.batches[2].values_at)
    (made.folder / second.file).unlink()
    (made.folder / third.file).write_bytes((made.folder / third.file).read_bytes() + b"xy")
    (made.folder / "train-00099.arrow").write_bytes(b"stray")
    (made.folder / "inputs.jsonl").write_text("{}\n")
    (made.folder / "bad_documents.jsonl").unlink()
    code, problems = verify(capsys, made)
    assert code == 2
    for wanted in (
        f"{first.file}, batch 0, bytes 0 to ",
        f"{first.file}, batch 2, bytes ",
        f"{second.file}: is missing",
        f"{third.file}, bytes {third.bytes} to {third.bytes + 2}: has {third.bytes + 2} bytes",
        "train-00099.arrow: is an extra shard",
        "inputs.jsonl: was changed",
        "bad_documents.jsonl: is missing",
    ):
        assert sum(line.startswith(wanted) for line in problems) == 1, (wanted, problems)
    assert len(problems) == 7


def test_a_truncated_shard_names_the_byte_and_the_batches_lost(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = record(made)
    path = made.folder / shard.file
    keep = shard.batches[1].values_at + 10
    path.write_bytes(path.read_bytes()[:keep])
    for options in ((), ("--quick",)):
        code, problems = verify(capsys, made, *options)
        assert code == 2
        assert problems == [
            f"{shard.file}, byte {keep}: is truncated: it has {keep} bytes, the manifest says "
            f"{shard.bytes}; batches 1 to {len(shard.batches) - 1} are cut off"
        ]
    flip(path, shard.batches[0].values_at)
    assert f"{shard.file}, batch 0, bytes" in verify(capsys, made)[1][1]


def test_what_was_written_wrong_is_found_without_any_hash(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = record(made)
    batch = shard.batches[1]
    path = made.folder / shard.file
    content = bytearray(path.read_bytes())
    content[batch.values_at + 4 : batch.values_at + 6] = b"\xff\xff"
    content[batch.offsets_at + 16 : batch.offsets_at + 24] = bytes(8)
    content[batch.doc_ids_at + 8 : batch.doc_ids_at + 16] = bytes(8)
    path.write_bytes(content)
    code, problems = verify(capsys, made)
    assert code == 2
    found = "\n".join(problems)
    assert f"batch 1, byte {batch.values_at + 4}: holds id 65535, outside the vocabulary" in found
    assert f"batch 1, byte {batch.offsets_at + 16}: its offsets do not rise: 0 after" in found
    assert f"batch 1, byte {batch.doc_ids_at + 8}: its doc_ids do not rise: 0 after" in found


def test_a_document_without_its_eos_is_named(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = record(made)
    batch = shard.batches[0]
    path = made.folder / shard.file
    content = bytearray(path.read_bytes())
    offsets = np.frombuffer(content, np.int64, batch.documents + 1, batch.offsets_at)
    at = batch.values_at + 2 * int(offsets[2] - 1)
    content = bytearray(content)
    content[at : at + 2] = b"\x05\x00"
    path.write_bytes(content)
    found = "\n".join(verify(capsys, made)[1])
    assert f"batch 0, byte {at}: its document 1 ends with id 5, not with the EOS 0" in found


def test_a_data_set_from_before_batch_hashes_says_that_the_place_is_unknown(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = read_manifest(made.folder).fingerprint
    write_version_1(
        made.folder, read_manifest(made.folder), change=lambda content: content.pop("batch_xxh3")
    )
    assert read_manifest(made.folder).fingerprint == fingerprint
    assert verify(capsys, made) == (0, [])
    shard = record(made)
    # An id that stays an id, so that no check of the content can notice.
    flip(made.folder / shard.file, shard.batches[1].values_at)
    code, problems = verify(capsys, made)
    assert code == 2
    assert len(problems) == 1
    assert problems[0].startswith(f"{shard.file}: is damaged: its xxh3 is")
    assert "where cannot be told, since the manifest holds no hashes of its batches" in problems[0]


def test_a_wrong_hash_in_the_manifest_is_not_laid_on_the_shard(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(made.folder)
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], xxh3="0" * 16)
    write_manifest(made.folder, replace(manifest, shards=shards))
    file = record(made, 1).file
    for options in ((), ("--sha256",)):
        code, problems = verify(capsys, made, *options)
        assert code == 2
        assert len(problems) == 1
        assert problems[0].startswith(f"manifest.json: its xxh3 of {file} or of one of its batches")


def test_a_manifest_that_contradicts_itself_or_the_files_is_named(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["shards"][0]["batches"][1][3] += 64
        content["shards"][1]["batches"][1][3] = 10**12
        content["inputs"]["documents"] += 1

    write_version_1(made.folder, read_manifest(made.folder), change=change)
    code, problems = verify(capsys, made)
    found = "\n".join(problems)
    assert code == 2
    assert f"{record(made).file}, batch 1, byte" in found
    assert "does not lie as the manifest says" in found
    assert f"it places batch 1 of {record(made, 1).file} outside the file" in found
    assert "manifest.json: its shards hold 150 documents, its inputs 151" in found


def test_a_flipped_byte_in_the_index_is_named(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(made.folder / "index.npy", 500)
    for options in ((), ("--quick",)):
        code, problems = verify(capsys, made, *options)
        assert code == 2
        assert len(problems) == 1
        assert problems[0].startswith("index.npy: was changed: its sha256 is")


def test_an_index_of_other_shards_under_the_same_fingerprint_is_named(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(made.folder)
    known = manifest.index.known_fingerprint
    shards = list(manifest.shards)
    shards[0] = replace(shards[0], sha256="0" * 64)
    forged = replace(manifest, shards=shards)
    forged.index.known_fingerprint = known
    write_manifest(made.folder, forged)
    found = verify(capsys, made)[1]
    assert found[0].startswith("manifest.json: its fingerprint is")


def test_a_shard_of_another_split_is_named_even_by_a_quick_look(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = record(made)
    path = made.folder / shard.file
    path.write_bytes(path.read_bytes().replace(b"mamba_dist.split", b"mamba_dist.SPLIT"))
    code, problems = verify(capsys, made, "--quick")
    assert code == 2
    assert problems[0].startswith(f"{shard.file}: belongs to another data set: its split is None")


def test_a_folder_that_is_no_data_set_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
