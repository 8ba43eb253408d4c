"""The precision that a loaded model decodes in, when that is not the fp32 of its parameters."""

import re
from typing import Final

import torch

from mamba_dist.model.lm import MambaLM

# The bias of dt_proj is added inside the scan, in fp32; the others are a part of their product.
_IN_PRODUCTS: Final = re.compile(
    r".*(embedding|lm_head|in_proj|x_proj|dt_proj|out_proj)\.weight|.*(in_proj|out_proj)\.bias"
)


def round_matrices(model: MambaLM) -> MambaLM:
    """The model itself, with bf16 in place of what its matrix products read.

    Those are embedding, head and projections. A, D, dt bias, norms and the convolution keep fp32,
    and so do the residual stream and the states. Autocast would compute the same products from fp32
    parameters, but read and round all of them again for each token.

    Only for models that are not trained any more.
    """
    for name, parameter in model.named_parameters():
        if _IN_PRODUCTS.fullmatch(name):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model
