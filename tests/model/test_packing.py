"""Documents packed into one sequence do not see each other."""

import pytest
import torch
from small_models import LAYERS, perturbed, small_config, tokens
from torch import Tensor

from mamba_dist.model.lm import MambaLM

# Lengths around the convolution's width and the chunk length, one document of a single token.
DOCUMENTS = ((17, 40, 1, 3, 70, 19), (90, 2, 16, 42))
LENGTH = 150


def packed_seq_idx() -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in DOCUMENTS]
    return torch.stack(rows).int()


def outputs_and_input_gradients(model: MambaLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the packed loss at each embedded token."""
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.backbone.embedding.register_forward_hook(keep)
    seq_idx = packed_seq_idx()
    model(ids, labels=ids.roll(-1, 1), seq_idx=seq_idx).backward()
    hook.remove()
    with torch.no_grad():
        logits = model(ids, seq_idx=seq_idx)
    assert embedded[0].grad is not None
    return logits, embedded[0].grad


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_replacing_a_document_leaves_all_others_bit_identical(layer: str, autocast: bool) -> None:
    model = perturbed(small_config(layer))
    ids = tokens(2, LENGTH)
    changed = ids.clone()
    start = sum(DOCUMENTS[0][:1])
    replaced = torch.zeros(2, LENGTH, dtype=torch.bool)
    replaced[0, start : start + DOCUMENTS[0][1]] = True
    changed[replaced] = (ids[replaced] + 1 + tokens(1, 40, seed=5)[0] % 60) % 61
    # The label of the position before the replaced document is its first token.
    with_new_label = torch.zeros_like(replaced)
    with_new_label[0, : start + 1] = True

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, gradients = outputs_and_input_gradients(model, ids)
        new_logits, new_gradients = outputs_and_input_gradients(model, changed)

    assert torch.equal(logits[~replaced], new_logits[~replaced])
    untouched = ~replaced & ~with_new_label
    assert torch.equal(gradients[untouched], new_gradients[untouched])
    assert not torch.equal(logits[replaced], new_logits[replaced])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_packed_document_has_the_logits_it_has_alone(layer: str) -> None:
    model = perturbed(small_config(layer))
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        logits = model(ids, seq_idx=packed_seq_idx())
        for row, lengths in enumerate(DOCUMENTS):
            for part in torch.arange(LENGTH).split(list(lengths)):
                alone = model(ids[row : row + 1, part])
                torch.testing.assert_close(logits[row : row + 1, part], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_without_boundaries_an_early_token_reaches_the_end(layer: str) -> None:
    model = perturbed(small_config(layer))
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 61
    with torch.no_grad():
        assert not torch.equal(model(ids)[:, -1], model(changed)[:, -1])
