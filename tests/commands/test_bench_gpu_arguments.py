"""How the GPU benchmarks read lists of names, and how they tell the command that they were."""

import argparse
from pathlib import Path

import pytest

from mamba_dist.commands.bench.gpu.arguments import command_lines, in_full, names


def test_names_are_listed_with_commas_each_once() -> None:
    assert names("graph, eager,graph") == ("graph", "eager")
    for text in ("", "graph,", ",graph", "a,,b"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not names with commas between"):
            names(text)


def test_a_command_in_full_can_be_given_to_a_shell_again() -> None:
    words = in_full(
        "gpu-train",
        [
            ("--config", Path("my configs/1b.yaml")),
            ("--batch", [1, 64]),
            ("--seconds", 1.5),
            ("--shape", None),
            ("--no-documents", True),
        ],
    )
    assert words == [
        "gpu-train", "--config", "my configs/1b.yaml", "--batch", "1", "64", "--seconds", "1.5",
        "--no-documents",
    ]  # fmt: skip
    given, full = command_lines(["gpu-train", "--config", "my configs/1b.yaml"], words).splitlines()
    assert given == "Command: `tools/bench.py gpu-train --config 'my configs/1b.yaml'`"
    assert full.startswith("In full: `tools/bench.py gpu-train --config 'my configs/1b.yaml' --ba")
