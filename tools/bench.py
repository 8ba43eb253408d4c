"""Measures kernels and training steps beside other implementations, see --help."""

from mamba_dist.commands.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
