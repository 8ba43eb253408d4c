"""Says what a run takes of memory and time, by stage, before there is any data, see --help."""

import signal

from mamba_dist.commands.plan import main

if __name__ == "__main__":
    # `| head` ends it without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main())
