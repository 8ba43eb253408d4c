"""The tiny run that is soaked: its corpus, shards and config, all by the seed."""

import random
from pathlib import Path
from typing import Any, Final

from mamba_dist.config.load import ConfigLoader
from mamba_dist.config.schema import RunConfig
from mamba_dist.data.preparation.build import BuildRequest, build_dataset
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.sources import DiscoveryOptions, Unit, discover

GLOBAL_BATCH: Final = 12
"""1, 2, 3 and 4 ranks share it evenly."""
SAVE_STEPS: Final = 4
EVAL_STEPS: Final = 6
KEEP_LAST: Final = 3
_VOCABULARY: Final = 300
_DOCUMENTS: Final = 120
_WORDS: Final = (
    *("state", "space", "model", "scan", "long", "text", "rank", "save", "kill", "and", "then"),
    *("forgets", "nothing", "begins", "again", "where", "another", "one", "had", "stopped", "it"),
)


class _Silent:
    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        pass

    def advanced(self, unit: Unit, record: PartRecord) -> None:
        pass

    def notice(self, text: str) -> None:
        pass


def make_data(folder: Path, *, seed: int) -> Path:
    """The data set, of about 11,000 training tokens, so that a long run has epochs."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    rng = random.Random(f"{seed} corpus")
    for number in range(_DOCUMENTS):
        text = f"{number}: " + " ".join(rng.choices(_WORDS, k=rng.randint(10, 80)))
        (corpus / f"{number:03}.txt").write_text(text + "\n", encoding="utf-8")
    shards = folder / "shards"
    request = BuildRequest(
        output=shards,
        corpus=discover([corpus], DiscoveryOptions()),
        tokenizer=None,
        train_vocab_size=_VOCABULARY,
        unit_bytes=8000,
        shard_bytes=8000,
        batch_tokens=1000,
    )
    build_dataset(request, _Silent())
    return shards


def write_config(path: Path, *, shards: Path, run_dir: Path, steps: int, seed: int) -> Path:
    """The config of a run of so many steps; launches override how it is spread over ranks."""
    config: dict[str, Any] = {
        "model": {"d_model": 32, "n_layers": 2, "vocab_size": 304},
        "training": {
            "run_dir": str(run_dir),
            "micro_batch_size": GLOBAL_BATCH,
            "global_batch_size": GLOBAL_BATCH,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "max_steps": steps,
            "eval_steps": EVAL_STEPS,
            "eval_sequences": 12,
            "precision": "fp32",
            "seed": seed,
        },
        "data": {
            "dataset_path": str(shards),
            "tokenizer_path": str(shards / "tokenizer.json"),
            "sequence_length": 32,
            "num_workers": 0,
            "seed": seed,
        },
        "engine": {"zero_stage": 1},
        "checkpoint": {"save_steps": SAVE_STEPS, "keep_last": KEEP_LAST},
        "telemetry": {"log_steps": 1, "tensorboard": False, "progress_bar": False},
    }
    ConfigLoader.save_to_file(RunConfig.model_validate(config), path)
    return path
