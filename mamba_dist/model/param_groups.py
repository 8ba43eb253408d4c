"""Which parameters decay: each is classified by exactly one pattern, or training does not start.

"1-D parameters don't decay" would miss Mamba-1's A_log, which is 2-D, and `_no_weight_decay` on a
parameter means nothing to torch or DeepSpeed. So the patterns are explicit.

Choices: decay of A_log, D and the dt bias would pull step sizes and memory lengths towards an
arbitrary point. The embedding does not decay, tied or not: AdamW's decay shrinks the rows of rare
tokens at every step, though they get a gradient seldom (OLMo 2, arXiv 2501.00656, does the same).
conv1d.weight and dt_proj.weight are ordinary linear maps and decay, like an untied lm_head.
"""

import re
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from mamba_dist.errors import ModelError
from mamba_dist.model.init import init_rule

_MIXER: Final = r"backbone\.layers\.\d+\.mixer\."
# pattern, decays
_TABLE: Final = tuple(
    (re.compile(pattern), decay)
    for pattern, decay in (
        (r"backbone\.embedding\.weight", False),
        (r"lm_head\.weight", True),
        (r"backbone\.(layers\.\d+\.norm|norm_f)\.weight", False),
        (_MIXER + r"norm\.weight", False),
        (_MIXER + r"(in_proj|x_proj|dt_proj|out_proj|conv1d)\.weight", True),
        (_MIXER + r"(in_proj|dt_proj|out_proj|conv1d)\.bias", False),
        (_MIXER + r"(A_log|D|dt_bias)", False),
    )
)


@dataclass(frozen=True)
class ParamClass:
    """How one parameter is treated: weight decay, initialisation rule in words, fp32 storage."""

    name: str
    shape: tuple[int, ...]
    decay: bool
    init: str
    fp32: bool


def classify(model: nn.Module) -> list[ParamClass]:
    """One record per parameter in the model's order, tied weights once.

    Raises:
        ModelError: a parameter matches no pattern or more than one.
    """
    return [_classify(name, parameter) for name, parameter in model.named_parameters()]


def format_table(classes: list[ParamClass]) -> str:
    """The classes as aligned text with one line per parameter, and the element counts below."""
    rows = [("parameter", "shape", "decay", "dtype", "initial values")]
    for c in classes:
        shape = "x".join(map(str, c.shape))
        rows.append(
            (c.name, shape, "yes" if c.decay else "no", "fp32" if c.fp32 else "NOT fp32", c.init)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for label, decay in (("with weight decay", True), ("without weight decay", False)):
        elements = sum(torch.Size(c.shape).numel() for c in classes if c.decay is decay)
        lines.append(f"{label}: {elements:,} elements")
    return "\n".join(lines)


def _classify(name: str, parameter: nn.Parameter) -> ParamClass:
    found = [decay for pattern, decay in _TABLE if pattern.fullmatch(name)]
    if len(found) != 1:
        raise ModelError(
            f"parameter {name} matches {len(found)} weight-decay patterns, expected exactly one; "
            "the table is in mamba_dist/model/param_groups.py"
        )
    # ZeRO-3 leaves an empty tensor behind and keeps the shape here.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return ParamClass(
        name=name,
        shape=tuple(shape),
        decay=found[0],
        init=init_rule(name).text,
        fp32=parameter.dtype == torch.float32,
    )
