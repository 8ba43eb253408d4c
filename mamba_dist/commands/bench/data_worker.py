"""One turn of `bench data` that is not our own script: encoding alone, or a peer's way of working.

Runs as `python -m mamba_dist.commands.bench.data_worker VARIANT CORPUS TOKENIZER FOLDER` and prints
one line of JSON: `cpu_s`, user and system seconds of the job without its imports, and `tokens`; or
`absent`, why it cannot run here.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mamba_dist.commands.bench.peers_tokenize import encoder_alone, megatron_loop
from mamba_dist.data.preparation.fast_backends import REFERENCE, load_encoder
from mamba_dist.data.tokenization import load_tokenizer
from mamba_dist.errors import MambaDistError

RAW: Final = "raw-"
"""Begins the name of a variant that is a backend's encoding alone."""
HF_MAP: Final = "hf-map"
MEGATRON: Final = "megatron"
_GROUP_DOCUMENTS: Final = 1000
_GROUP_CHARACTERS: Final = 4 << 20


def main(variant: str, corpus: Path, tokenizer: Path, folder: Path) -> dict[str, float | str]:
    """What is printed."""
    try:
        job = _job(variant, corpus, tokenizer, folder)
    except (ImportError, MambaDistError) as error:
        return {"absent": str(error)}
    before = _cpu_s()
    tokens = job()
    return {"cpu_s": _cpu_s() - before, "tokens": tokens}


def _job(variant: str, corpus: Path, tokenizer: Path, folder: Path) -> Callable[[], int]:
    if variant.startswith(RAW):
        encode = _encoder(variant.removeprefix(RAW), tokenizer)
        groups = _groups(corpus)
        return lambda: sum(map(encode, groups))
    if variant == HF_MAP:
        from mamba_dist.commands.bench.peers_datasets import huggingface_map

        return lambda: huggingface_map(corpus, tokenizer, folder)
    return lambda: megatron_loop(corpus, tokenizer, folder)


def _encoder(backend: str, tokenizer: Path) -> Callable[[list[str]], int]:
    if backend == REFERENCE:
        return encoder_alone(tokenizer)
    eos_token = load_tokenizer(tokenizer).eos_token
    encoder = load_encoder(backend, tokenizer, eos_token=eos_token)
    return lambda group: encoder.encode_flat(group)[0].size


def _groups(corpus: Path) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    characters = 0
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(groups[-1]) == _GROUP_DOCUMENTS or characters > _GROUP_CHARACTERS:
                groups.append([])
                characters = 0
            groups[-1].append(text)
            characters += len(text)
    return groups


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    print(json.dumps(main(name, *map(Path, paths))))
