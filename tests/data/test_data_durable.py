from pathlib import Path

import pytest
import xxhash

from mamba_dist.data import durable
from mamba_dist.data.durable import hash_file, new_folder, stretch_hashes
from mamba_dist.errors import DataError


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000])
def test_stretches_are_hashed_wherever_the_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(durable, "_BLOCK_BYTES", block_bytes)
    content = bytes(range(200))
    path = tmp_path / "file"
    path.write_bytes(content)
    ends = [0, 7, 64, 65, 65, 130, 200]
    wanted = [
        xxhash.xxh3_64_hexdigest(content[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    assert stretch_hashes(path, ends) == wanted
    assert stretch_hashes(path, []) == []
    assert hash_file(path).xxh3 == xxhash.xxh3_64_hexdigest(content)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "set") as staging:  # noqa: PT012
        (staging / "a").write_text("a")
        assert not (tmp_path / "set").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "set") as staging:
        (staging / "a").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "a").read_text() == "a"
    with pytest.raises(DataError, match="exists already"), new_folder(tmp_path / "set"):
        pass
