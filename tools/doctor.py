"""Says what works on this machine and checks it, see --help."""

from mamba_dist.commands.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
