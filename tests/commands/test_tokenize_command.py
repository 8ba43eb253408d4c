import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from word_corpus import folder_contents

from mamba_dist.commands.tokenize import main
from mamba_dist.commands.train_tokenizer import main as train_tokenizer
from mamba_dist.data.dataset import open_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data_prep" / "tokenize.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(40):
        words = rng.choices(["state", "space", "model", "scan", "def", "return"], k=60)
        (folder / f"{number:02}.py").write_text(f"{number} " + " ".join(words))
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    assert train_tokenizer([str(corpus), "--vocab-size", "300", "--output", str(path)]) == 0
    return path


def run(*arguments: object, cwd: Path, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr().err
    error = captured[captured.index("error: ") :]
    assert "Traceback" not in captured
    return error


def test_a_corpus_alone_is_enough_and_every_choice_is_said(corpus: Path, tmp_path: Path) -> None:
    done = run(SCRIPT, corpus, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "data" / "corpus")
    assert dataset.manifest.documents("train") + dataset.manifest.documents("val") == 40
    assert dataset.manifest.settings.train_split == 0.9
    assert "a new byte-level BPE of 8192 ids, trained on the corpus into data/corpus" in done.stdout
    assert "output     data/corpus" in done.stdout
    assert f"workers    {len(os.sched_getaffinity(0))}" in done.stdout
    assert re.search(r"40 documents in .* documents/s, .* MB/s", done.stdout)
    tokens = f"{dataset.manifest.tokens('train'):,} tokens"
    assert tokens in done.stdout
    assert "tokenizing: " in done.stderr
    again = run(SCRIPT, corpus, cwd=tmp_path)
    assert again.returncode == 0
    assert "is already complete, made from the same inputs; nothing to do" in again.stdout


@pytest.mark.parametrize("place", ["corpus", "here"])
def test_a_tokenizer_beside_the_corpus_or_here_is_found(
    corpus: Path, tokenizer: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "corpus"
    own.mkdir()
    for path in corpus.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    target = own if place == "corpus" else tmp_path
    (target / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["corpus", "--workers", "1"]) == 0
    manifest = open_dataset(tmp_path / "data" / "corpus").manifest
    assert manifest.tokenizer.vocab_size == 300
    assert manifest.inputs.files == 40


def test_the_data_section_of_a_config_acts_and_flags_override_it(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    data = {
        "tokenizer_path": str(tokenizer),
        "dataset_path": str(tmp_path / "from-config"),
        "train_split": 0.7,
        "val_split": 0.3,
        "tokenize_batch_documents": 2,
    }
    config = tmp_path / "run.yaml"
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    assert main([str(corpus), "--config", str(config), "--workers", "1"]) == 0
    manifest = open_dataset(tmp_path / "from-config").manifest
    assert (manifest.settings.train_split, manifest.settings.val_split) == (0.7, 0.3)
    assert manifest.tokenizer.vocab_size == 300
    flags = ("--output", tmp_path / "from-flag", "--train-split", "0.8", "--train-bpe", "280")
    assert main([str(a) for a in (corpus, "--config", config, *flags, "--workers", "1")]) == 0
    manifest = open_dataset(tmp_path / "from-flag").manifest
    assert (manifest.settings.train_split, manifest.settings.val_split) == (0.8, 0.2)
    assert manifest.tokenizer.vocab_size == 280


def test_a_config_of_a_mixture_does_not_say_where_to_write(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    data = {"tokenizer_path": str(tokenizer), "sources": [{"path": "a"}, {"path": "b"}]}
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    error = failed(capsys, corpus, "--config", config)
    assert "data.sources and no data.dataset_path; give --output" in error


def test_a_tokenizer_that_the_config_names_must_exist(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    data = {"tokenizer_path": "none.json"}
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    error = failed(capsys, corpus, "--config", config, "--output", tmp_path / "set")
    assert "none.json (data.tokenizer_path of" in error
    assert "tools/train_tokenizer.py" in error
    assert not (tmp_path / "set").exists()


def test_excluded_and_chosen_extensions_are_left_and_taken(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    options = ["--tokenizer", str(tokenizer), "--workers", "1"]
    output = ["--output", str(tmp_path / "excluded"), "--exclude", "0*", "--exclude", "1?.py"]
    assert main([str(corpus), *options, *output]) == 0
    assert open_dataset(tmp_path / "excluded").manifest.inputs.files == 20
    (tmp_path / "mixed").mkdir()
    for path in corpus.iterdir():
        (tmp_path / "mixed" / f"{path.stem}.log").write_bytes(path.read_bytes())
    (tmp_path / "mixed" / "x.py").write_text("left out")
    output = ["--output", str(tmp_path / "logs"), "--extensions", "log"]
    assert main([str(tmp_path / "mixed"), *options, *output]) == 0
    assert open_dataset(tmp_path / "logs").manifest.inputs.files == 40


def test_too_many_bad_documents_say_which_and_what_to_do(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"body": "x"}) for _ in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = ("--tokenizer", tokenizer, "--output", tmp_path / "set", "--max-bad", 2)
    error = failed(capsys, tmp_path / "a.jsonl", *options)
    assert "3 bad documents, more than --max-bad 2" in error
    assert "a.jsonl:1: no text field (fields: body)" in error
    assert "--text-field" in error


def test_tasks_and_a_merge_make_what_one_command_makes(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(corpus), "--tokenizer", str(tokenizer), "--workers", "1"]
    there = [*options, "--output", str(tmp_path / "there")]
    assert main([*options, "--output", str(tmp_path / "here")]) == 0
    assert main([*there, "--task", "1/2"]) == 0
    assert "task 1/2: its 0 units are made; once those of all 2 tasks are, the same" in (
        capsys.readouterr().out
    )
    assert "no --task has run" in failed(capsys, *there, "--merge")
    assert main([*there, "--task", "0/2"]) == 0
    assert main([*there, "--merge"]) == 0
    assert folder_contents(tmp_path / "there") == folder_contents(tmp_path / "here")
    assert main([*there, "--task", "0/2"]) == 0
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*there, "--task", "0/2", "--overwrite"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{corpus}", "--task", "2/2"], "--task 2/2 is none of several tasks; expected I/N"),
        (["{corpus}", "--task", "0/2"], "several tasks cannot train one tokenizer"),
        (["nowhere"], "corpus nowhere does not exist"),
        (["{corpus}", "--tokenizer", "none.json"], "tokenizer none.json does not exist"),
        (["{corpus}", "--train-bpe", "100"], "--vocab-size 100 is too small"),
        (["{corpus}", "--extensions", ".nope"], "only files of other kinds (40 .py)"),
    ],
)
def test_every_mistake_is_one_clear_line(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    filled = [argument.format(corpus=corpus) for argument in arguments]
    error = failed(capsys, *filled, "--output", tmp_path / "set", "--workers", "1")
    assert said in error
    assert error.count("\n") == 1


def start_plain(tmp: Path) -> tuple[list[object], Path]:
    return [Path("data_prep") / "tokenize.py"], ROOT


def start_absolute(tmp: Path) -> tuple[list[object], Path]:
    return [SCRIPT], tmp


def start_own_folder(tmp: Path) -> tuple[list[object], Path]:
    return ["tokenize.py"], SCRIPT.parent


def start_dotted(tmp: Path) -> tuple[list[object], Path]:
    return [Path("..") / "data_prep" / "." / "tokenize.py"], ROOT / "tools"


def start_file_link(tmp: Path) -> tuple[list[object], Path]:
    (tmp / "tokenize.py").symlink_to(SCRIPT)
    return ["tokenize.py"], tmp


def start_folder_link(tmp: Path) -> tuple[list[object], Path]:
    (tmp / "prep").symlink_to(SCRIPT.parent)
    return ["prep/tokenize.py"], tmp


def start_module(tmp: Path) -> tuple[list[object], Path]:
    return ["-m", "data_prep.tokenize"], ROOT


STARTS = (
    start_plain,
    start_absolute,
    start_own_folder,
    start_dotted,
    start_file_link,
    start_folder_link,
    start_module,
)


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__.removeprefix("start_"))
def test_a_script_called_tokenize_does_not_shadow_the_standard_library(
    corpus: Path, tokenizer: Path, tmp_path: Path, start: object
) -> None:
    (tmp_path / "there").mkdir()
    script, cwd = start(tmp_path / "there")  # type: ignore[operator]
    options = ("--tokenizer", tokenizer, "--output", tmp_path / "set", "--workers", 2)
    done = run(*script, corpus, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert open_dataset(tmp_path / "set").manifest.inputs.files == 40


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__.removeprefix("start_"))
def test_the_real_message_of_a_failing_worker_reaches_stderr(
    tmp_path: Path, corpus: Path, tokenizer: Path, start: object
) -> None:
    # A tokenizer that loads and then fails in the workers, with an error that nobody foresaw.
    broken = json.loads(tokenizer.read_text(encoding="utf-8"))
    broken["model"] = {"type": "WordLevel", "vocab": {"state": 1, "<eos>": 0}, "unk_token": "?"}
    broken["added_tokens"] = []
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    (tmp_path / "there").mkdir()
    script, cwd = start(tmp_path / "there")  # type: ignore[operator]
    options = ("--tokenizer", path, "--output", tmp_path / "set", "--workers", 2)
    done = run(*script, corpus, *options, cwd=cwd)
    assert done.returncode == 2
    assert "SpawnProcess" in done.stderr
    assert "error: two workers died on " in done.stderr
    assert "(exit code 1, its own message is above)" in done.stderr
    assert "WordLevel error: Missing [UNK] token from the vocabulary" in done.stderr
    assert "AttributeError" not in done.stderr
