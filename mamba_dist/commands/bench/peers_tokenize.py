"""The `tokenizers` library alone, and the loop of Megatron-LM's tools/preprocess_data.py around it:
each line is parsed, encoded, ended by EOD and appended to a flat file of int32 with the lengths
beside it. One process, one thread.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers


def encoder_alone(tokenizer: Path) -> Callable[[Sequence[str]], int]:
    """What encodes texts, drops the ids, and gives their number."""
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    loaded.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> int:
        found = loaded.encode_batch_fast(list(texts), add_special_tokens=False)
        return sum(map(len, found))

    return encode


def megatron_loop(corpus: Path, tokenizer: Path, folder: Path) -> int:
    """The number of ids, EOD not counted; `folder` takes them."""
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    end_of_document = 0
    lengths = []
    with corpus.open(encoding="utf-8") as lines, (folder / "ids.bin").open("wb") as stream:
        for line in lines:
            ids = loaded.encode(json.loads(line)["text"], add_special_tokens=False).ids
            lengths.append(len(ids))
            ids.append(end_of_document)
            stream.write(np.array(ids, dtype=np.int32).tobytes(order="C"))
    (folder / "ids.idx").write_bytes(np.array(lengths, dtype=np.int32).tobytes())
    return sum(lengths)
