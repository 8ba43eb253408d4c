"""Turns a corpus into token shards: `python data_prep/tokenize.py corpus/`, see --help."""

if __name__ == "__main__":
    # Python puts a script's folder first on its path, where this file would shadow the standard
    # library's `tokenize`, which torch, logging and multiprocessing import. By value, since the
    # folder may stand anywhere on the path, under any spelling.
    import os
    import sys

    own_folder = os.path.realpath(os.path.dirname(__file__))
    real_folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.realpath(p) not in (own_folder, real_folder)]

    from mamba_dist.commands.tokenize import main

    raise SystemExit(main())
