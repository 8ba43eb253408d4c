from contextlib import nullcontext

import pytest
import torch

from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import ConfigError, DataError
from mamba_dist.inference.generate import GenerationSettings, generate, stream
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM

GREEDY = SamplingSettings(temperature=0.0)
LAYERS = ("mamba1", "mamba2")
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40, 7, 7], list(range(30))]


def opinionated_model(layer: str) -> MambaLM:
    """Random weights with large logits, whose greedy choice no rounding can change.

    The head has weights of its own: the embedding's would repeat the last token for ever.
    """
    config = MambaConfig(
        layer=layer, d_model=32, n_layers=2, vocab_size=61, d_state=8, headdim=16, chunk_size=16,
        pad_vocab_size_multiple=64, initializer_range=1.0, tie_embeddings=False,
    )  # fmt: skip
    model = MambaLM(config)
    initialize(model, config, seed=0, gather=lambda _: nullcontext())
    return model


@pytest.mark.parametrize("layer", LAYERS)
def test_greedy_text_is_the_argmax_of_the_full_forward(layer: str) -> None:
    model = opinionated_model(layer)
    for prompt in PROMPTS:
        [text] = generate(model, [prompt], GenerationSettings(max_new_tokens=12, sampling=GREEDY))
        assert len(text) == 12
        assert len(set(text)) > 3, "a text that repeats itself proves little"
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text]))[0, :, :61]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == text


@pytest.mark.parametrize("sampling", [GREEDY, SamplingSettings(temperature=3.0, top_k=20)])
@pytest.mark.parametrize("layer", LAYERS)
def test_prompts_of_different_lengths_in_one_batch_give_the_texts_they_give_alone(
    layer: str, sampling: SamplingSettings
) -> None:
    model = opinionated_model(layer)
    settings = GenerationSettings(max_new_tokens=15, sampling=sampling)
    together = generate(model, PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        # Before it stand texts of one token, so that the random stream is that of its row.
        alone = generate(model, [[0]] * row + [prompt], settings)[row]
        assert together[row] == alone


def test_a_seed_repeats_a_text_and_another_seed_changes_it() -> None:
    model = opinionated_model("mamba1")

    def texts(seed: int) -> list[list[int]]:
        sampling = SamplingSettings(temperature=20.0)
        return generate(model, [[3, 4]] * 2, GenerationSettings(10, seed=seed, sampling=sampling))

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0)[0] != texts(0)[1]


def test_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    model = opinionated_model("mamba1")
    with torch.no_grad():
        # Every direction that the model can look in points to ids which must not come out.
        model.lm_head.weight[40:] *= 30
    hot = SamplingSettings(temperature=1e6)
    texts = generate(model, [[1]] * 20, GenerationSettings(50, sampling=hot))
    assert max(map(max, texts)) == 60
    for sampling in (hot, GREEDY):
        settings = GenerationSettings(50, vocab_size=40, sampling=sampling)
        assert max(map(max, generate(model, [[1]] * 20, settings))) < 40


def test_a_text_ends_at_the_end_of_sequence_token_and_others_go_on() -> None:
    model = opinionated_model("mamba2")
    free = generate(model, PROMPTS, GenerationSettings(max_new_tokens=12, sampling=GREEDY))
    eos = free[0][5]
    settings = GenerationSettings(max_new_tokens=12, eos_id=eos, sampling=GREEDY)
    for text, stopped in zip(free, generate(model, PROMPTS, settings), strict=True):
        assert stopped == (text[: text.index(eos)] if eos in text else text)


def test_streaming_yields_each_step_as_it_is_made_and_stops_when_all_texts_ended() -> None:
    model = opinionated_model("mamba1")
    text = generate(model, [[3]], GenerationSettings(max_new_tokens=12, sampling=GREEDY))[0]
    settings = GenerationSettings(max_new_tokens=12, eos_id=text[4], sampling=GREEDY)
    steps = list(stream(model, [[3]], settings))
    length = text.index(text[4])
    assert steps == [(token,) for token in text[:length]] + [(None,)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2 has no tokens"),
        ([[1, 61]], "prompt 1 holds token ids 1 to 61, the model has 0 to 60"),
        ([[-1]], "prompt 1 holds token ids -1"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(
    prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        generate(opinionated_model("mamba1"), prompts, GenerationSettings())


def test_no_prompts_give_no_texts() -> None:
    assert generate(opinionated_model("mamba1"), [], GenerationSettings()) == []


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        GenerationSettings(max_new_tokens=0)


@pytest.mark.parametrize("size", [0, -5])
def test_a_vocabulary_without_ids_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size is {size}, expected at least 1"):
        GenerationSettings(vocab_size=size)
