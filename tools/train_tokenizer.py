"""Trains a tokenizer: `tools/train_tokenizer.py CORPUS --vocab-size N --output tokenizer.json`."""

from mamba_dist.commands.train_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
