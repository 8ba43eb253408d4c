"""A real data set, of several shards and batches, for the commands that look after data sets."""

import random
import shutil
from pathlib import Path

import pytest
from made_dataset import MadeDataset

from mamba_dist.data.manifest import Manifest
from mamba_dist.data.preparation.build import BuildRequest, build_dataset
from mamba_dist.data.preparation.parts import PartRecord
from mamba_dist.data.preparation.sources import DiscoveryOptions, Unit, discover
from mamba_dist.data.tokenization import train_bpe

WORDS = ["state", "space", "café", "東京", "def", "return", "scan", "model"]


class _Silent:
    def started(self, *, total_bytes: int, done_bytes: int) -> None: ...

    def advanced(self, unit: Unit, record: PartRecord) -> None: ...

    def notice(self, text: str) -> None: ...


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeDataset:
    folder = tmp_path_factory.mktemp("made_once")
    corpus = folder / "corpus"
    corpus.mkdir()
    rng = random.Random(3)
    texts = {
        f"corpus/{number:03}.txt": f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))
        for number in range(150)
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (corpus / "041-empty.txt").touch()
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(train_bpe(texts.values(), vocab_size=320), encoding="utf-8")
    manifest = _tokenize(corpus, tokenizer, folder / "set")
    assert len(manifest.shards_of("train")) >= 3
    assert len(manifest.shards[0].batches) >= 3
    return MadeDataset(folder / "set", texts)


@pytest.fixture(scope="session")
def made_beside(made_once: MadeDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller data set of other texts and the same tokenizer."""
    folder = tmp_path_factory.mktemp("made_beside")
    (folder / "corpus").mkdir()
    for number in range(60):
        text = f"beside {number} " + "scan model state " * (5 + number % 7)
        (folder / f"corpus/{number:02}.txt").write_text(text, encoding="utf-8")
    _tokenize(folder / "corpus", made_once.folder / "tokenizer.json", folder / "set")
    return folder / "set"


def _tokenize(corpus: Path, tokenizer: Path, output: Path) -> Manifest:
    request = BuildRequest(
        output=output,
        corpus=discover([corpus], DiscoveryOptions()),
        tokenizer=tokenizer,
        train_vocab_size=None,
        train_split=0.8,
        val_split=0.2,
        unit_bytes=4000,
        shard_bytes=2500,
        batch_tokens=400,
    )
    return build_dataset(request, _Silent()).manifest


@pytest.fixture
def made(made_once: MadeDataset, tmp_path: Path) -> MadeDataset:
    """A copy that a test may damage."""
    shutil.copytree(made_once.folder, tmp_path / "set")
    return MadeDataset(tmp_path / "set", made_once.texts)
