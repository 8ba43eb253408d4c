import math

import pytest
import torch
from torch import Generator, Tensor

from mamba_dist.errors import ConfigError, ModelError
from mamba_dist.inference.sampling import (
    SamplingSettings,
    chosen_ids,
    most_probable,
    sample,
    token_probabilities,
)


def random_logits(rows: int, ids: int) -> Tensor:
    return 2 * torch.randn(rows, ids, generator=Generator().manual_seed(0))


def drawn(logits: Tensor, settings: SamplingSettings, *, seed: int = 0) -> Tensor:
    """One token for each row, all rows from generators of their own."""
    generators = [Generator().manual_seed(1000 * seed + row) for row in range(len(logits))]
    return sample(logits, settings, generators=generators)


def test_temperature_zero_takes_the_most_probable_token() -> None:
    logits = random_logits(50, 33)
    assert torch.equal(drawn(logits, SamplingSettings(temperature=0.0)), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_without_waiting_is_that_of_temperature_zero(dtype: torch.dtype) -> None:
    # In bf16 many rows have their largest logit twice.
    logits = random_logits(300, 330).to(dtype)
    expected = drawn(logits, SamplingSettings(temperature=0.0)).tolist()
    assert chosen_ids(most_probable(logits).tolist()) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_choice_without_waiting_tells_rows_that_are_not_finite(value: float) -> None:
    logits = random_logits(3, 20)
    logits[1, 7] = value
    choice = most_probable(logits)
    assert choice[1].tolist() == [1, 0, 1]
    assert 0 <= choice[0].min() <= choice[0].max() < 20
    with pytest.raises(ModelError, match="logits are not finite"):
        chosen_ids(choice.tolist())


def test_sampled_frequencies_follow_the_tempered_softmax() -> None:
    logits, settings = random_logits(1, 6), SamplingSettings(temperature=0.7)
    tokens = drawn(logits.expand(20_000, 6), settings)
    frequencies = tokens.bincount(minlength=6) / len(tokens)
    torch.testing.assert_close(frequencies, (logits[0] / 0.7).softmax(-1), rtol=0, atol=0.015)


@pytest.mark.parametrize("k", [1, 3, 100])
def test_top_k_keeps_exactly_the_k_most_probable_tokens(k: int) -> None:
    logits = random_logits(200, 20)
    kept = token_probabilities(logits, SamplingSettings(top_k=k)) > 0
    assert (kept.sum(-1) == min(k, 20)).all()
    best = torch.zeros_like(kept).scatter(-1, logits.topk(min(k, 20)).indices, True)
    assert torch.equal(kept, best)
    for seed in range(5):
        tokens = drawn(logits, SamplingSettings(top_k=k), seed=seed)
        assert best.gather(-1, tokens[:, None]).all()


def test_top_k_keeps_k_tokens_when_all_are_equal() -> None:
    probabilities = token_probabilities(torch.zeros(1, 8), SamplingSettings(top_k=3))
    assert sorted(probabilities[0].tolist()) == pytest.approx([0.0] * 5 + [1 / 3] * 3)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(p: float) -> None:
    logits = random_logits(200, 30)
    full = logits.double().softmax(-1)
    found = token_probabilities(logits, SamplingSettings(top_p=p))
    kept = found > 0
    mass = (full * kept).sum(-1)
    least = torch.where(kept, full, math.inf).amin(-1)
    assert (mass >= p).all()
    assert (mass - least < p).all()
    assert (full.masked_fill(kept, 0.0).amax(-1) <= least).all()
    torch.testing.assert_close(found, full * kept / mass[:, None])


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    found = token_probabilities(logits, SamplingSettings(top_k=2, top_p=0.55))
    assert found[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_same_generators_draw_the_same_tokens_and_others_do_not() -> None:
    logits, settings = random_logits(64, 40), SamplingSettings()
    assert torch.equal(drawn(logits, settings, seed=1), drawn(logits, settings, seed=1))
    assert not torch.equal(drawn(logits, settings, seed=1), drawn(logits, settings, seed=2))


def test_a_row_draws_the_same_whatever_rows_are_beside_it() -> None:
    logits, settings = random_logits(5, 40), SamplingSettings()
    together = drawn(logits, settings)
    alone = sample(logits[3:4], settings, generators=[Generator().manual_seed(3)])
    assert alone[0] == together[3]


@pytest.mark.parametrize("temperature", [1e-310, 1.0, 1e30])
def test_impossible_tokens_are_never_drawn_at_any_temperature(temperature: float) -> None:
    logits = random_logits(500, 10).index_fill(-1, torch.tensor([0, 4, 9]), -math.inf)
    tokens = drawn(logits, SamplingSettings(temperature=temperature))
    assert torch.isin(tokens, torch.tensor([1, 2, 3, 5, 6, 7, 8])).all()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_random_range(
    draw: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([draw], dtype=torch.float64))
    logits = random_logits(500, 10).index_fill(-1, torch.tensor([0, 9]), -math.inf)
    assert (drawn(logits, SamplingSettings()) == (1 if draw == 0 else 8)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_is_an_error(temperature: float) -> None:
    with pytest.raises(ModelError, match="logits are not finite"):
        drawn(torch.tensor([[0.0, math.nan]]), SamplingSettings(temperature=temperature))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        SamplingSettings(**{field: value})  # type: ignore[arg-type]
