"""tools/bench.py data-read: opening and reading token files, ours beside other formats.

A package beside `bench`, whose own imports take seconds: here each measurement starts processes.
"""
