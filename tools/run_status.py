"""Tells how far a run is and how its starts ended, see --help."""

import signal

from mamba_dist.commands.run_status import main

if __name__ == "__main__":
    # `| head` ends it without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main())
