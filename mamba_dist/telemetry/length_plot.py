"""The histogram of document lengths as a picture, by matplotlib (extra `plot`), without a display.

Imported only when a picture is asked for.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def save_length_plot(
    path: Path, histogram: Sequence[tuple[int, int, int]], *, title: str, median_tokens: int
) -> None:
    """Draws (from, below, documents) ranges of length in tokens; the name's ending is the format.

    Raises:
        OSError, ValueError: the file cannot be written, or matplotlib knows no such format.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    begins = [begin for begin, _, _ in histogram]
    widths = [below - begin for begin, below, _ in histogram]
    counts = [documents for _, _, documents in histogram]
    axes.bar(begins, counts, width=widths, align="edge", edgecolor="white")
    axes.axvline(median_tokens, color="black", linestyle="--", label=f"median {median_tokens:,}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document, EOS included")
    axes.set_ylabel("documents")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)
