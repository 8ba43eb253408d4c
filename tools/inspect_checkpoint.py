"""What a checkpoint holds, whether it is whole, and how it differs from another, see --help."""

from mamba_dist.commands.inspect_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
