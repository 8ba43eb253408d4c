import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from made_dataset import MadeDataset

from mamba_dist.commands.pack_shards import main
from mamba_dist.data import archive
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.durable import exclusive_lock

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pack(dataset: Path, output: Path, *options: object) -> Path:
    assert main(["pack", str(dataset), str(output), *map(str, options)]) == 0
    return output


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_files_larger_than_a_block_are_moved_in_pieces(
    made_once: MadeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_BLOCK_BYTES", 50)
    packed = pack(made_once.folder, tmp_path / "packed")
    assert main(["unpack", str(packed), str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(made_once.folder)


@pytest.mark.parametrize("options", [(), ("--level", 19, "--threads", 3), ("--level", 1)])
def test_a_data_set_comes_back_byte_for_byte(
    made_once: MadeDataset, tmp_path: Path, options: tuple[object, ...]
) -> None:
    packed = pack(made_once.folder, tmp_path / "packed", *options)
    assert main(["unpack", str(packed), str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(made_once.folder)
    open_dataset(tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "packed"]


def test_an_archive_is_plain_zstd(made_once: MadeDataset, tmp_path: Path) -> None:
    packed = pack(made_once.folder, tmp_path / "packed")
    for name, content in contents(made_once.folder).items():
        archive = (packed / f"{name}.zst").read_bytes()
        assert zstandard.ZstdDecompressor().decompress(archive) == content
        assert zstandard.get_frame_parameters(archive).has_checksum
    assert not (packed / "manifest.json").exists()


def test_the_script_says_what_it_did(made_once: MadeDataset, tmp_path: Path) -> None:
    script = ROOT / "tools/pack_shards.py"
    for arguments in (("pack", made_once.folder, "a"), ("unpack", "a", "b")):
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "MB/s" in done.stdout


def test_nothing_is_overwritten(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(made_once.folder, tmp_path / "packed")
    before = contents(packed)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for output in (packed, tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        assert "exists already" in failed(capsys, "pack", made_once.folder, output)
        assert "exists already" in failed(capsys, "unpack", packed, output)
    assert contents(packed) == before
    assert contents(tmp_path / "mine") == {"thesis.txt": b"mine"}


def test_an_empty_folder_may_be_filled(made_once: MadeDataset, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pack(made_once.folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "packed.json").is_file()


def test_any_damaged_archive_is_named_and_nothing_is_left(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(made_once.folder, tmp_path / "packed")
    for path in sorted(packed.glob("*.zst")):
        whole = path.read_bytes()
        for damage in (
            whole[: len(whole) // 2],
            whole + b"x",
            bytes([whole[0] ^ 1]) + whole[1:],
            whole[: len(whole) // 2]
            + bytes([whole[len(whole) // 2] ^ 1])
            + whole[len(whole) // 2 + 1 :],
            whole[:-1] + bytes([whole[-1] ^ 1]),
        ):
            path.write_bytes(damage)
            error = failed(capsys, "unpack", packed, tmp_path / "back")
            assert str(path) in error
            assert any(word in error for word in ("damaged", "truncated", "too long"))
            assert [entry.name for entry in tmp_path.iterdir()] == ["packed"]
        path.unlink()
        assert f"{path} is missing" in failed(capsys, "unpack", packed, tmp_path / "back")
        path.write_bytes(whole)
    assert main(["unpack", str(packed), str(tmp_path / "back")]) == 0


def test_a_damaged_or_newer_index_is_one_clear_error(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(made_once.folder, tmp_path / "packed")
    path = packed / "packed.json"
    whole = json.loads(path.read_text())
    file = whole["files"][0]
    for change, wanted in (
        ({"format_version": 2}, "format version 2, this program reads 1"),
        ({"fingerprint": "0" * 64}, "belongs to another data set"),
        ({"files": [{**file, "name": "../x"}]}, "leads out of the folder"),
        ({"files": [file, *whole["files"][2:]]}, "belongs to another data set"),
        ({"files": 3}, "is damaged"),
    ):
        path.write_text(json.dumps({**whole, **change}))
        assert wanted in failed(capsys, "unpack", packed, tmp_path / "back")
        assert [entry.name for entry in tmp_path.iterdir()] == ["packed"]
    path.unlink()
    assert "holds no packed.json" in failed(capsys, "unpack", packed, tmp_path / "back")


@pytest.mark.parametrize("name", ["train-00001.arrow", "tokenizer.json", "inputs.jsonl"])
def test_a_damaged_or_incomplete_data_set_is_not_packed(
    made: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = made.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = failed(capsys, "pack", made.folder, tmp_path / "packed")
    assert f"{path} is damaged and was not packed" in error
    path.unlink()
    error = failed(capsys, "pack", made.folder, tmp_path / "packed")
    assert f"{path}: No such file" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_run_left_is_cleared_by_the_next(
    made_once: MadeDataset, tmp_path: Path
) -> None:
    left = tmp_path / ".packed.partial" / "files"
    left.mkdir(parents=True)
    (left / "train-00000.arrow.zst").write_bytes(b"half")
    (left.parent / ".lock").touch()
    pack(made_once.folder, tmp_path / "packed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["packed"]


def test_two_runs_into_one_folder_do_not_meet(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".packed.partial").mkdir()
    with exclusive_lock(tmp_path / ".packed.partial"):
        error = failed(capsys, "pack", made_once.folder, tmp_path / "packed")
        assert "another process is writing" in error


def interrupted(run: "subprocess.Popen[str]") -> str:
    """What it says in the end. As a person does, the key is pressed again if nothing happens: a
    signal may come between Python's last look at signals and the opening that then waits for ever.
    """
    for _ in range(4):
        run.send_signal(signal.SIGINT)
        try:
            return run.communicate(timeout=15)[1]
        except subprocess.TimeoutExpired:
            continue
    run.kill()
    return run.communicate()[1]


def test_an_interrupted_run_leaves_nothing(made_once: MadeDataset, tmp_path: Path) -> None:
    # A named pipe in the place of a file holds the run until the signal comes.
    for path in made_once.folder.iterdir():
        if path.name != "bad_documents.jsonl":
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    os.mkfifo(tmp_path / "set" / "bad_documents.jsonl")
    run = subprocess.Popen(
        [sys.executable, ROOT / "tools/pack_shards.py", "pack", "set", "packed"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    before = tmp_path / ".packed.partial/files/inputs.jsonl.zst"
    until = time.monotonic() + 60
    while not before.exists() and time.monotonic() < until:
        time.sleep(0.05)
    error = interrupted(run)
    assert run.returncode == 130, error
    assert "interrupted; nothing was left in packed" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
