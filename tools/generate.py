"""Continues prompts: `python tools/generate.py runs/quickstart --prompt "def main("`."""

from mamba_dist.commands.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
