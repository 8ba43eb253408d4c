"""Plans which documents share a training sequence (data.packing best_fit and pad), see --help."""

from mamba_dist.commands.plan_packing import main

if __name__ == "__main__":
    raise SystemExit(main())
