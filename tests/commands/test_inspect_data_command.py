import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_dataset import MadeDataset

from mamba_dist.commands.inspect_data import main
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.statistics import split_statistics


def inspect(
    capsys: pytest.CaptureFixture[str], made: MadeDataset, *options: object, code: int = 0
) -> str:
    capsys.readouterr()
    assert main([str(made.folder), *map(str, options)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.parametrize("split", ["train", "val"])
def test_statistics_equal_those_of_the_whole_stream(made_once: MadeDataset, split: str) -> None:
    dataset = open_dataset(made_once.folder)
    stream = getattr(dataset, split)
    ids, begins = stream.read(0, stream.tokens)
    lengths = np.diff([*np.flatnonzero(begins), stream.tokens])
    found = split_statistics(made_once.folder, dataset.manifest, split, advance=lambda _: None)
    assert found.documents == len(lengths)
    assert found.tokens == stream.tokens
    assert found.mean_length == pytest.approx(lengths.mean())
    assert found.id_counts.tolist() == np.bincount(ids, minlength=320).tolist()
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        wanted = np.quantile(lengths, share, method="inverted_cdf")
        assert found.length_quantile(share) == wanted
    counted = Counter(int(length).bit_length() for length in lengths)
    assert {begin.bit_length(): n for begin, _, n in found.length_histogram() if n} == counted
    top, count = found.most_frequent(1)[0]
    assert count == np.bincount(ids).max() == np.bincount(ids)[top]


def test_everything_is_printed(made_once: MadeDataset, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = open_dataset(made_once.folder).manifest
    printed = inspect(capsys, made_once, "--samples", "2", "--tokens", "3")
    assert f"documents   {manifest.documents('train'):>18,}" in printed
    assert f"tokens      {manifest.tokens('train'):>18,}" in printed
    assert "tokens per document: mean" in printed
    assert "50 %:" in printed
    assert "#####" in printed
    documents = manifest.documents("train")
    share = 100 * documents / manifest.tokens("train")
    assert f"EOS <|endoftext|> (id 0): {documents:,}, {share:.3f} % of the tokens" in printed
    assert "of 320," in printed
    assert printed.count("--- doc_id") == 2


def test_samples_are_the_texts_of_their_documents(
    made_once: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = inspect(capsys, made_once, "--samples", "1000", "--sample-tokens", "10000")
    shown = printed.split("\n--- doc_id ")[1:]
    manifest = open_dataset(made_once.folder).manifest
    assert len(shown) == manifest.documents("train")
    texts = list(made_once.texts.values())
    for one in shown:
        head, text = one.split("\n", 1)
        assert text.rstrip("\n") == texts[int(head.split(",")[0])]
    assert inspect(capsys, made_once, "--samples", "0").count("--- doc_id") == 0


def test_a_picture_without_matplotlib_is_one_clear_error(
    made_once: MadeDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "mamba_dist.telemetry.length_plot", raising=False)
    error = inspect(capsys, made_once, "--histogram", tmp_path / "x.png", code=2)
    assert error.startswith("error: --histogram needs matplotlib, which is not installed")
    assert "plot" in error
    assert not (tmp_path / "x.png").exists()


def test_the_picture_is_a_png(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the optional package matplotlib is not installed")
    assert "wrote" in inspect(capsys, made_once, "--histogram", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    error = inspect(capsys, made_once, "--histogram", tmp_path / "no" / "x.png", code=2)
    assert "cannot write the picture" in error


def test_damaged_data_is_one_clear_error(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = open_dataset(made.folder).manifest.shards[0]
    path = made.folder / shard.file
    content = bytearray(path.read_bytes())
    content[shard.batches[0].values_at : shard.batches[0].values_at + 2] = b"\xff\xff"
    path.write_bytes(content)
    error = inspect(capsys, made, code=2)
    assert f"shard {path} is damaged: it holds id 65535 of 320" in error
    assert "tools/verify_shards.py" in error


def test_another_tokenizer_in_the_folder_is_refused(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert "does not match the shards" in inspect(capsys, made, code=2)
