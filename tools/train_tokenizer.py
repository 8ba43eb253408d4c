"""Trains a tokenizer: `python tools/train_tokenizer.py corpus/ --vocab-size 8192 --output t.json`."""

from mamba_dist.commands.train_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
