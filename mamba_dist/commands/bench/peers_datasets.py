"""How Hugging Face's scripts tokenise, as in transformers' run_clm.py: `load_dataset("json")`, then
`map` of a fast tokenizer over batches of texts, which writes an Arrow cache. One process.
"""

from pathlib import Path
from typing import Any

import datasets
import transformers

_MAP_BATCH = 1000


def huggingface_map(corpus: Path, tokenizer: Path, folder: Path) -> int:
    """The number of ids; `folder` takes the cache."""
    datasets.disable_progress_bars()
    loaded: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tokenizer)
    )
    found = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(folder)
    )
    made = found.map(
        lambda batch: loaded(batch["text"], add_special_tokens=False),
        batched=True,
        batch_size=_MAP_BATCH,
        remove_columns=found.column_names,
    )
    column = made.data.column("input_ids")
    return sum(len(chunk.flatten()) for chunk in column.chunks)
