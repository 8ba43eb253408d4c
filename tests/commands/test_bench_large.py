"""tools/bench.py data-large: the corpus it makes, and the memory that it tells of."""

import json
from pathlib import Path

import pytest
from processes import run_script

from mamba_dist.commands.bench import data_large, main
from mamba_dist.commands.bench.data_large import Sample, table, write_corpus
from mamba_dist.data.tokenization import save_tokenizer, train_bpe


def test_data_large_tells_of_every_worker_and_of_all_text(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("the state space model scans a long text\n" * 200, encoding="utf-8")
    save_tokenizer(tmp_path / "tokenizer.json", train_bpe([source.read_text()], vocab_size=300))
    (tmp_path / "large").mkdir()
    done = run_script(
        *("tools/bench.py", "data-large", "--text-mb", "5", "--workers", "2"),
        *("--corpus", source, "--tokenizer", tmp_path / "tokenizer.json"),
        *("--folder", tmp_path / "large", "--json", tmp_path / "found.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "5 MB of text, " in done.stdout
    samples = json.loads((tmp_path / "found.json").read_text())["samples"]
    assert max(len(sample) for sample in samples) >= 3  # the time, the main process and a worker
    assert 30e6 < max(peak for sample in samples for peak in sample[1:]) < 4e9


def test_no_two_documents_of_the_corpus_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_large, "_FILE_BYTES", 4_000)
    written = write_corpus(tmp_path / "corpus", ["one two", "three four"], text_bytes=10_000)
    files = sorted((tmp_path / "corpus").iterdir())
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert len(files) == 3
    assert sum(len(text.encode()) for text in texts) == written >= 10_000
    assert len(set(texts)) == len(texts)


def test_growth_is_told_from_a_quarter_of_the_time_on() -> None:
    samples = [Sample(float(n), (1_000_000, 100_000_000 + 10_000_000 * n)) for n in range(41)]
    text = table([Sample(0.0, (1_000_000,)), *samples])
    assert "| 40 | 1 | 500 |" in text
    assert "at most 2.50x that of a quarter" in text


def test_a_folder_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["data-large", "--tokenizer", "t.json", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    assert "is no empty folder" in capsys.readouterr().err
