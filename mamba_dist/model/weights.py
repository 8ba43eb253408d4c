"""Sets the parameters of a model from tensors by name, as checkpoints and imports hold them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mamba_dist.errors import ModelError

_NAMES_SHOWN = 5


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` into the parameters of the same names; tied weights occur once.

    Nothing is copied unless everything fits.

    Raises:
        ModelError: a name is missing or unknown, or a shape differs.
    """
    parameters = dict(model.named_parameters())
    differences = [f"{name} is missing" for name in parameters if name not in tensors]
    differences += [f"{name} is not in this model" for name in tensors if name not in parameters]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if differences:
        shown = "; ".join(differences[:_NAMES_SHOWN])
        more = len(differences) - _NAMES_SHOWN
        raise ModelError(
            f"weights do not fit the model: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ". They belong to another model section of the config"
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
