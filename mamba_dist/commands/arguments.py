"""Argument types that several scripts share."""

import argparse


def positive_int(text: str) -> int:
    """The whole number above zero that `text` says.

    Raises:
        argparse.ArgumentTypeError, ValueError: it says none; argparse turns both into its message.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def not_negative_int(text: str) -> int:
    """The whole number from zero up that `text` says.

    Raises:
        argparse.ArgumentTypeError, ValueError: it says none; argparse turns both into its message.
    """
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
