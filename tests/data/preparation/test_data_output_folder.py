import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from made_data import build, folder_bytes, made_texts

from mamba_dist.errors import DataError


def write_arrow(path: Path, *, seed: int = 0) -> Path:
    table = pa.table({"text": made_texts(40, seed=seed)})
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


# The second is beside many a SentencePiece model, the third is a file of Hugging Face datasets.
@pytest.mark.parametrize("name", ["thesis.doc", "tokenizer.vocab", "train-00000-of-00002.arrow"])
def test_a_folder_of_other_things_is_never_written_into(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=rf"not a data set \(it holds {name}\)"):
            build(corpus_path, tmp_path, tokenizer_path, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_replaced_by_a_shard_of_its_name(
    tokenizer_path: Path, tmp_path: Path, overwrite: bool
) -> None:
    path = write_arrow(tmp_path / "set" / "train-00000.arrow")
    link = tmp_path / "link.arrow"
    link.symlink_to(path)
    before = path.read_bytes()
    for root in (path, link):
        with pytest.raises(
            DataError, match=r"holds train-00000.arrow, which is an input.*--output"
        ):
            build(root, tmp_path / "set", tokenizer_path, overwrite=overwrite)
    assert path.read_bytes() == before
    copy = Path(shutil.copy(path, tmp_path / "elsewhere.arrow"))
    build(copy, tmp_path / "set", tokenizer_path, overwrite=overwrite)
    assert path.read_bytes() != before


def test_a_tokenizer_trained_into_the_folder_is_used_or_kept(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    output.mkdir()
    only = output / "tokenizer.json"
    only.write_text(tokenizer_path.read_text() + "\n")
    before = folder_bytes(output)
    with pytest.raises(DataError, match=r"holds tokenizer.json, which is not the tokenizer in use"):
        build(corpus_path, output, tokenizer_path)
    with pytest.raises(DataError, match=r"not the tokenizer in use and would be replaced"):
        build(corpus_path, output, None, train_vocab_size=300)
    assert folder_bytes(output) == before
    build(corpus_path, output, only)
    assert only.read_bytes() == before["tokenizer.json"]
    # Of a finished data set it is but a part.
    (output / "manifest.json").unlink()
    build(corpus_path, output, tokenizer_path)
    assert only.read_bytes() == tokenizer_path.read_bytes()


def test_a_tokenizer_in_the_folder_is_there_after_a_kill_at_any_moment(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    output.mkdir()
    tokenizer = Path(shutil.copy(tokenizer_path, output / "tokenizer.json"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            build(corpus_path, output, tokenizer)
    build(corpus_path, output, tokenizer)
    assert tokenizer.read_bytes() == tokenizer_path.read_bytes()
