"""What `data_prep/tokenize.py` reads, and how it ends on input that is bad, by the real command."""

import contextlib
import io
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
import zstandard

from mamba_dist.commands.tokenize import main
from mamba_dist.commands.train_tokenizer import main as train_tokenizer
from mamba_dist.commands.which_docs import main as which_docs
from mamba_dist.data.dataset import open_dataset

ROWS = [{"id": f"doc-{n}", "text": f"text {n} " + "state space model scan " * 9} for n in range(60)]
LINES = [json.dumps(row).encode() for row in ROWS]
CONTENT = b"\n".join(LINES) + b"\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    (folder / "a.jsonl").write_bytes(CONTENT)
    path = folder / "tokenizer.json"
    train = [str(folder / "a.jsonl"), "--vocab-size", "300", "--output", str(path)]
    assert train_tokenizer(train) == 0
    return path


class Command:
    """The command with an output folder and a tokenizer."""

    def __init__(self, tokenizer: Path, folder: Path) -> None:
        self.output = folder / "set"
        self._tokenizer = tokenizer
        self._folder = folder

    def run(self, *arguments: object, stdin: bytes, workers: int) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        given = [*map(str, arguments), "--tokenizer", str(self._tokenizer)]
        given += ["--output", str(self.output), "--workers", str(workers)]
        out, error = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self._folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            code = main(given)
        return code, out.getvalue(), error.getvalue()

    def done(self, *arguments: object, stdin: bytes = b"", workers: int = 1) -> str:
        """What a run prints that ends well, and leaves a data set and nothing else."""
        code, said, message = self.run(*arguments, stdin=stdin, workers=workers)
        assert code == 0, message
        assert [path.name for path in self.output.iterdir() if path.name.startswith(".")] == []
        return said

    def failed(self, *arguments: object, stdin: bytes = b"", workers: int = 1) -> str:
        """The message of a run that ends badly, and leaves no shard and no manifest."""
        code, _, message = self.run(*arguments, stdin=stdin, workers=workers)
        assert code == 2, message
        left = list(self.output.iterdir()) if self.output.exists() else []
        assert [path.name for path in left if not path.name.startswith(".")] == []
        return message[message.index("error: ") :]

    def documents(self) -> int:
        return open_dataset(self.output).manifest.inputs.documents

    def bad(self) -> list[tuple[str, int, str]]:
        """File, line and fault of each document passed over."""
        lines = (self.output / "bad_documents.jsonl").read_text().splitlines()
        return [(bad["file"], bad["line"], bad["fault"]) for bad in map(json.loads, lines)]


@pytest.fixture
def command(tokenizer: Path, tmp_path: Path) -> Command:
    return Command(tokenizer, tmp_path)


def test_refused_standard_input_leaves_nothing_that_stands_in_the_way(command: Command) -> None:
    command.done("-", stdin=CONTENT)
    code, _, message = command.run("-", stdin=CONTENT * 2, workers=1)
    assert code == 2
    assert "1 input files changed: stdin" in message
    assert not (command.output / ".stdin").exists()
    assert "is already complete" in command.done("-", stdin=CONTENT)
    code, _, message = command.run("-", "--stdin-format", "text", stdin=CONTENT, workers=1)
    assert code == 2
    assert "1 input files read in another format: stdin" in message


def test_standard_input_of_an_unfinished_data_set_stays_when_another_format_is_refused(
    command: Command,
) -> None:
    command.failed("-", "--max-bad", "0", stdin=CONTENT + b"broken\n")
    message = command.failed("-", "--stdin-format", "text")
    assert "1 input files read in another format: stdin" in message
    command.done("-", "--max-bad", "1")
    assert command.documents() == 60


def test_standard_input_is_read_and_its_documents_are_known_by_their_ids(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command.done("-", "--id-field", "id", stdin=zstandard.compress(CONTENT), workers=2)
    assert command.documents() == 60
    assert which_docs([str(command.output), "--doc-id", "17", "--tokens", "0"]) == 0
    said = capsys.readouterr().out
    assert "doc_id 17 (id 'doc-17' in its source): " in said
    assert "tokens from stdin, document 18 of its 60" in said
    again = command.done("-", "--id-field", "id", stdin=zstandard.compress(CONTENT))
    assert "is already complete" in again


def test_standard_input_stands_where_it_is_named_among_files(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the first document")
    (tmp_path / "z.txt").write_text("the last document")
    command.done("a.txt", "-", "z.txt", "--stdin-format", "text", "--train-split", "0.5",
                 stdin=b"one\ndocument\n")  # fmt: skip
    inputs = (command.output / "inputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in inputs] == ["a.txt", "stdin", "z.txt"]


def test_a_run_on_standard_input_that_failed_goes_on_without_it(command: Command) -> None:
    message = command.failed("-", "--max-bad", "0", stdin=CONTENT + b"broken\n", workers=2)
    assert "stdin:61: broken JSON" in message
    message = command.failed("-", stdin=CONTENT)
    assert "holds an unfinished data set made of other standard input" in message
    command.done("-", "--max-bad", "1")
    assert command.documents() == 60


def test_tasks_do_not_share_standard_input(command: Command) -> None:
    message = command.failed("-", "--task", "0/2", stdin=CONTENT)
    assert "several tasks cannot share one standard input; write it to a file" in message
    assert not command.output.exists()


def test_a_quoted_glob_is_expanded(command: Command, tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_bytes(CONTENT)
    (tmp_path / "data" / "deep" / "b.jsonl.zst").write_bytes(zstandard.compress(CONTENT))
    (tmp_path / "data" / "deep" / "c.txt").write_text("no match")
    (tmp_path / "data" / "d.jsonl.zst").symlink_to(tmp_path / "data" / "deep" / "b.jsonl.zst")
    said = command.done("data/**/*.jsonl*")
    assert "1 symbolic duplicates left out" in said
    assert command.documents() == 120


def test_bad_documents_are_counted_and_named_and_the_others_kept(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "c").mkdir()
    bad = [b'{"text": "caf\xe9"}', b'{"text": "cut', b'{"body": "x"}', b'{"text": " "}']
    long = json.dumps({"text": "x" * 3000}).encode()
    (tmp_path / "c" / "a.jsonl").write_bytes(b"\n".join([*LINES[:30], *bad, long, *LINES[30:]]))
    (tmp_path / "c" / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c" / "c.txt").write_bytes(b"")
    (tmp_path / "c" / "d.jsonl").write_bytes(b"")
    (tmp_path / "c" / "e.jsonl.zst").write_bytes(b"")
    (tmp_path / "c" / "f.txt").symlink_to("nowhere.txt")
    message = command.failed("c", "--max-bad", 4, "--max-record-bytes", 2000)
    assert "5 bad documents, more than --max-bad 4; among them:" in message
    assert "c/a.jsonl:35: too long (over 2,000 bytes; see --max-record-bytes)" in message
    said = command.done("c", "--max-bad", 5, "--max-record-bytes", 2000)
    assert "7 documents passed over" in said
    assert "1 files of other kinds left out (1 (broken link))" in said
    assert command.bad() == [
        ("c/a.jsonl", 31, "not UTF-8"),
        ("c/a.jsonl", 32, "broken JSON"),
        ("c/a.jsonl", 33, "no text field"),
        ("c/a.jsonl", 34, "empty"),
        ("c/a.jsonl", 35, "too long"),
        ("c/b.txt", 1, "not UTF-8"),
        ("c/c.txt", 1, "empty"),
    ]
    assert command.documents() == 60


def test_a_line_longer_than_many_units_is_passed_over_once(
    command: Command, tmp_path: Path
) -> None:
    with (tmp_path / "a.jsonl").open("wb") as stream:
        stream.write(b"\n".join(LINES[:30]) + b"\n")
        stream.truncate(256 << 20)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + b"\n".join(LINES[30:]))
    # A quarter of a gigabyte would not fit beside what the libraries take.
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({512 << 20},) * 2)"
    program = (
        f"{limit}; import sys; from mamba_dist.commands.tokenize import main; sys.exit(main())"
    )
    del program
    command.done("a.jsonl", workers=2)
    assert command.bad() == [("a.jsonl", 31, "too long")]
    assert command.documents() == 60


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_that_is_cut_short_is_mended_and_the_run_goes_on(
    command: Command, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    whole = zstandard.compress(CONTENT)
    (tmp_path / "b.jsonl.zst").write_bytes(whole[:-9])
    message = command.failed("a.jsonl", "b.jsonl.zst", workers=workers)
    assert "b.jsonl.zst is cut short: its zstd stream does not end; replace or" in message
    (tmp_path / "b.jsonl.zst").write_bytes(whole)
    message = command.failed("a.jsonl", "b.jsonl.zst", workers=workers)
    assert "1 input files changed: b.jsonl.zst" in message
    command.done("a.jsonl", "b.jsonl.zst", "--overwrite", workers=workers)
    assert command.documents() == 120


def test_files_that_cannot_be_read_are_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(CONTENT)
    # Reading it fails with an input/output error, even for root, and its size is not 0.
    (tmp_path / "c" / "b.jsonl").symlink_to("/proc/self/mem")
    assert "error: cannot read c/b.jsonl: Input/output error; fix or --exclude it" in (
        command.failed("c", "--text-field", "text")
    )
    (tmp_path / "c" / "b.jsonl").unlink()
    (tmp_path / "c" / "b.jsonl").symlink_to("b.jsonl")
    assert "(broken link)" in command.done("c", "--overwrite")
    assert command.documents() == 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("place", "workers"), [("parts", 2), ("shards", 1)])
def test_a_full_disk_ends_in_a_message_and_the_same_command_goes_on(
    command: Command, tmp_path: Path, small_disk: Path, place: str, workers: int
) -> None:
    rng = random.Random(4)
    texts = ("".join(rng.choices("abcdefgh ", k=200)) for _ in range(1000))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    command.done("a.jsonl")
    fingerprint = open_dataset(command.output).manifest.fingerprint
    size = sum(path.stat().st_size for path in command.output.glob("*.arrow"))
    assert 200_000 < size < 500_000
    command.output = small_disk / "set"
    room = 100_000 + (0 if place == "parts" else size)
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - room))
    message = command.failed("a.jsonl", workers=workers)
    assert "No space left on device" in message
    assert "; free some space and run the same command again" in message
    (small_disk / "ballast").unlink()
    said = command.done("a.jsonl", workers=workers)
    assert ("continuing: " in said) == (place == "shards")
    assert open_dataset(command.output).manifest.fingerprint == fingerprint


def test_a_disk_too_small_for_standard_input_is_named_and_left_as_it_was(
    command: Command, small_disk: Path
) -> None:
    command.output = small_disk / "set"
    message = command.failed("-", stdin=CONTENT * 100)
    assert "cannot keep standard input in" in message
    assert "No space left on device; free some space, or give an --output on another" in message
    assert list(command.output.iterdir()) == []


def test_a_tokenizer_with_ids_beyond_the_models_vocabulary_is_refused_at_once(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    run = {"schema_version": 2, "training": {"max_steps": 2000, "gradient_accumulation_steps": 1}}
    for vocab_size in (299, 300):
        config = {**run, "model": {"vocab_size": vocab_size}}
        (tmp_path / f"{vocab_size}.yaml").write_text(yaml.safe_dump(config))
    message = command.failed("a.jsonl", "--config", "299.yaml")
    assert "has 300 ids, model.vocab_size of 299.yaml is 299; set it to at least 300" in message
    assert not command.output.exists()
    message = command.failed("a.jsonl", "--config", "299.yaml", "--train-bpe", 400)
    assert "the tokenizer to be trained has 400 ids" in message
    command.done("a.jsonl", "--config", "300.yaml")


def test_closed_standard_input_is_one_message(
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", None)  # as Python finds it after `<&-`
    given = ["-", "--tokenizer", str(tokenizer), "--output", str(tmp_path / "set")]
    assert main(given) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_corpus_of_an_impossible_name_is_one_message_without_an_output_too(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["x" * 300, "--tokenizer", str(tokenizer)]) == 2
    assert "cannot read xxx" in capsys.readouterr().err


def test_a_file_name_that_is_not_utf8_is_shown_on_any_terminal(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").write_bytes(CONTENT)
    (corpus / os.fsdecode(b"b.\xff")).touch()
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="utf-8"))
    given = [corpus, "--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 1]
    assert main([*map(str, given)]) == 0
    assert rb"1 .\udcff" in shown.getvalue()
