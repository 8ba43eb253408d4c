"""The tokenize command as a user runs it, killed at will: `kill -9` of all of it or of a worker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, clean_environment
from word_corpus import folder_contents, write_corpus, write_tokenizer

SCRIPT = ROOT / "data_prep" / "tokenize.py"

# Comes before the command by PYTHONPATH: the tokenizer dies of one text, as of a library's bug.
FATAL = """
import os, signal
from mamba_dist.data import tokenization

encode = tokenization._HuggingFace.encode_flat

def encode_flat(self, texts):
    if any("FATAL" in text for text in texts):
        os.kill(os.getpid(), signal.SIGSEGV)
    return encode(self, texts)

tokenization._HuggingFace.encode_flat = encode_flat
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", files=6)


def start(corpus: Path, tokenizer: Path, output: Path, *, workers: int, first_on_path: str = ""):
    options = ("--tokenizer", tokenizer, "--output", output, "--backend", "reference")
    environment = clean_environment()
    if first_on_path:
        environment["PYTHONPATH"] = f"{first_on_path}:{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, *map(str, (SCRIPT, corpus, *options, "--workers", workers))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


def run(*arguments: Path, **options: object) -> str:
    process = start(*arguments, **options)  # type: ignore[arg-type]
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before it was killed")
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "set"
    run(corpus, tokenizer, output, workers=1)
    return folder_contents(output)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "sign",
    [
        ".partial-*/parts",
        ".partial-*/parts/.*.partial",
        ".partial-*/parts/*.part",
        ".partial-*/journal.jsonl",
        ".partial-*/shards/*.arrow",
        "*.arrow",
        "manifest.json",
    ],
)
def test_the_command_killed_at_any_stage_goes_on_and_gives_the_same_bytes(
    undisturbed: dict[str, bytes],
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    workers: int,
    sign: str,
) -> None:
    output = tmp_path / "set"
    process = start(corpus, tokenizer, output, workers=workers)
    wait_for(lambda: any(output.glob(sign)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    parts = len(list(output.glob(".partial-*/parts/unit-*.part")))
    lines = sum(path.read_bytes().count(b"\n") for path in output.glob(".partial-*/journal.jsonl"))
    if not any(output.glob("manifest.json")):
        assert parts - lines <= workers
    run(corpus, tokenizer, output, workers=3 - workers % 3)
    assert folder_contents(output) == undisturbed


def test_a_killed_worker_is_replaced_and_the_bytes_are_the_same(
    undisturbed: dict[str, bytes], corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    process = start(corpus, tokenizer, output, workers=2)
    wait_for(lambda: len(list(output.glob(".partial-*/parts/.*.partial"))) == 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    os.kill(int(workers[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "a worker died " in out
    assert "killed by SIGKILL (out of memory?)" in out
    assert "once more" in out
    assert folder_contents(output) == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_a_text_that_kills_the_tokenizer_is_named_and_what_else_was_done_is_kept(
    corpus: Path, tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    own = tmp_path / "corpus"
    own.mkdir()
    for path in corpus.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    lines = (own / "3.jsonl").read_text().splitlines()
    lines[1233] = lines[1233].replace("3 1233", "FATAL")
    (own / "3.jsonl").write_text("\n".join(lines))
    (tmp_path / "sitecustomize.py").write_text(FATAL)
    output = tmp_path / "set"
    options = {"workers": workers, "first_on_path": str(tmp_path)}
    process = start(own, tokenizer, output, **options)  # type: ignore[arg-type]
    out, err = process.communicate(timeout=240)
    if workers == 1:
        # The process itself died of it; the next run has a crew.
        assert process.returncode == -signal.SIGSEGV
        process = start(own, tokenizer, output, **options)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert f"at {own / '3.jsonl'}:1234 (killed by SIGSEGV)" in err
    assert f"between {own / '3.jsonl'}:1001 and {own / '3.jsonl'}:2000" in out
    [journal] = output.glob(".partial-*/journal.jsonl")
    kept = journal.read_bytes().count(b"\n")
    assert kept >= 2
