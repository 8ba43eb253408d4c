"""Recurrent states of many texts as one batch.

A text's state has the same size whatever its length, so prompts of different lengths are read each
by itself and batched afterwards: there is no padding that could leak into a state.
"""

from collections.abc import Sequence

import torch

from mamba_dist.model.state import LayerState


def stack_states(texts: Sequence[Sequence[LayerState]]) -> list[LayerState]:
    """States of all layers with the texts along the batch, from the layers of each text."""
    return [
        LayerState(
            conv=torch.cat([state.conv for state in layer]),
            ssm=torch.cat([state.ssm for state in layer]),
        )
        for layer in zip(*texts, strict=True)
    ]
