"""Documents packed into one sequence do not see each other: rows made up, rows of a data set."""

import random
from pathlib import Path

import pytest
import torch
from data.made_data import write_dataset
from small_models import LAYERS, perturbed, small_config, tokens
from torch import Tensor

from mamba_dist.config.schema import Packing
from mamba_dist.data.batch import IGNORED_LABEL, SampleId, pack
from mamba_dist.data.planning import make_plan
from mamba_dist.data.samples import training_samples
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import resolve_backend

# Lengths around the convolution's width and the chunk length, one document of a single token.
DOCUMENTS = ((17, 40, 1, 3, 70, 19), (90, 2, 16, 42))
LENGTH = 150


def packed_seq_idx() -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in DOCUMENTS]
    return torch.stack(rows).int()


def outputs_and_input_gradients(
    model: MambaLM, ids: Tensor, labels: Tensor, seq_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the packed loss at each embedded token."""
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.backbone.embedding.register_forward_hook(keep)
    model(ids, labels=labels, seq_idx=seq_idx).backward()
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
        logits, gradients = outputs_and_input_gradients(
            model, ids, ids.roll(-1, 1), packed_seq_idx()
        )
        new_logits, new_gradients = outputs_and_input_gradients(
            model, changed, changed.roll(-1, 1), packed_seq_idx()
        )

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


MODES = ("concat", "best_fit", "pad")
EPOCH_LENGTH = 48


def documents() -> list[list[int]]:
    """Of 2 to 90 ids of the small models and an EOS, so that some are cut in every mode."""
    rng = random.Random(4)
    return [[*rng.choices(range(1, 61), k=n), 0] for n in (20, 90, 5, 47, 30, 2, 48, 11, 64, 26)]


def epoch(folder: Path, packing: Packing, docs: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and seq_idx of all samples of an epoch over documents."""
    dataset = write_dataset(folder, docs, docs[:1], batch_tokens=100)
    if packing != "concat":
        make_plan(
            folder,
            dataset.manifest,
            packing=packing,
            length=EPOCH_LENGTH,
            advance=lambda tokens: None,
        )
    samples = training_samples(dataset, packing=packing, length=EPOCH_LENGTH)
    rows = pack([samples], [SampleId(0, number) for number in range(len(samples))], pad_token_id=0)
    return tuple(map(torch.from_numpy, (rows.input_ids, rows.labels, rows.seq_idx)))


def positions_of(changed: Tensor, seq_idx: Tensor) -> Tensor:
    """All positions of the documents, in each row, in which something changed."""
    return torch.stack(
        [torch.isin(owners, owners[moved]) for owners, moved in zip(seq_idx, changed, strict=True)]
    )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("packing", MODES)
def test_a_document_of_a_data_set_can_be_replaced_under_all_others(
    tmp_path: Path, packing: Packing, layer: str, backend: str
) -> None:
    model = perturbed(small_config(layer), backend=resolve_backend(backend, device_type="cpu"))
    docs = documents()
    ids, labels, seq_idx = epoch(tmp_path / "one", packing, docs)
    logits, gradients = outputs_and_input_gradients(model, ids, labels, seq_idx)
    for number in (1, 4):  # one that is cut, one that is whole
        other = [*docs]
        other[number] = [*(token % 60 + 1 for token in docs[number][:-1]), 0]
        new_ids, new_labels, new_seq_idx = epoch(tmp_path / str(number), packing, other)
        assert torch.equal(seq_idx, new_seq_idx)
        replaced = positions_of(ids != new_ids, seq_idx)
        assert len(docs[number]) - 1 <= replaced.sum() <= len(docs[number])
        assert torch.equal(labels[~replaced], new_labels[~replaced])
        new_logits, new_gradients = outputs_and_input_gradients(
            model, new_ids, new_labels, new_seq_idx
        )
        assert torch.equal(logits[~replaced], new_logits[~replaced])
        assert torch.equal(gradients[~replaced], new_gradients[~replaced])
        assert not torch.equal(gradients[replaced], new_gradients[replaced])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("packing", MODES)
def test_a_packed_piece_of_a_document_has_the_loss_and_gradients_it_has_alone(
    tmp_path: Path, packing: Packing, layer: str
) -> None:
    model = perturbed(small_config(layer), backend=resolve_backend("cpu", device_type="cpu"))
    ids, labels, seq_idx = epoch(tmp_path, packing, documents())
    logits, gradients = outputs_and_input_gradients(model, ids, labels, seq_idx)
    for row, owners in enumerate(seq_idx):
        for number in range(int(owners.max()) + 1):
            place = (slice(row, row + 1), owners == number)
            if (labels[place] == IGNORED_LABEL).all():
                assert not gradients[place].any()
                continue
            alone, alone_gradients = outputs_and_input_gradients(
                model, ids[place], labels[place], torch.zeros_like(seq_idx[place])
            )
            torch.testing.assert_close(logits[place], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradients[place], alone_gradients, rtol=1e-4, atol=1e-5)
