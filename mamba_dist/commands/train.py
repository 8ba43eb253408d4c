"""launch/train.py: checks a configuration, plans a run, trains it.

Exit codes: 0 trained to the last step; 75 stopped by a signal after a checkpoint, found hanging by
the watchdog, or short of what may come back (memory, a checkpoint that cannot be written or read
now): start again to continue; 65 training is broken (steps skipped in a row that no rollback got
past, or a final loss that is not finite); 2 any other mistake that the message explains; anything
else is a crash.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

from mamba_dist.commands.arguments import positive_int
from mamba_dist.config.load import LoadedConfig, load_config
from mamba_dist.errors import MambaDistError, StartError

_LET_FIRST_RANK_SPEAK_S = 10.0


def main(argv: Sequence[str] | None = None, *, first_rank: bool = True) -> int:
    """The exit code of the command line `argv`; every rank of a launch calls it."""
    arguments = arguments_parser().parse_args(argv)
    try:
        loaded = load_config(arguments.config, arguments.overrides)
        if first_rank:
            _print_account(loaded)
        if arguments.check:
            if first_rank:
                print(f"{arguments.config}: valid")
            return 0
        # torch and DeepSpeed take seconds to import; a config error must not wait for them.
        from mamba_dist.train.run import describe_plan, run_training

        if arguments.dry_run:
            if first_rank:
                print(describe_plan(loaded.config, world_size=arguments.ranks))
            return 0
        return run_training(loaded.config)
    except MambaDistError as error:
        if not first_rank and not error.of_one_rank:
            # The launcher ends all ranks once one has failed; if the first rank has nothing to say
            # within this time, the error is this rank's own.
            time.sleep(_LET_FIRST_RANK_SPEAK_S)
        if first_rank or not isinstance(error, StartError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def arguments_parser() -> argparse.ArgumentParser:
    """What launch/train.py takes."""
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Train a Mamba language model; continues where the run folder left off.",
    )
    parser.add_argument("--config", required=True, help="YAML or JSON file, see configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replace single fields of the config",
    )
    parser.add_argument("--check", action="store_true", help="only validate the config")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved plan and train nothing"
    )
    parser.add_argument(
        "--ranks", type=positive_int, default=1, help="number of ranks that --dry-run plans for"
    )
    parser.add_argument(
        "--version", action="version", version=f"mamba-dist {version('mamba-dist')}"
    )
    # The DeepSpeed launcher passes it before the user's arguments; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _print_account(loaded: LoadedConfig) -> None:
    for line in loaded.account:
        print(line)
