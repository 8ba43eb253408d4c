"""Decoding by captured steps: on a CPU through a stand-in for the capture, on a GPU for real."""

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import BackendError, ModelError
from mamba_dist.inference.generate import GenerationSettings, generate, stream
from mamba_dist.inference.graph import DecodingStep, DecodingSteps
from mamba_dist.inference.precision import round_matrices
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM
from mamba_dist.ops.backend import describe_backends

LAYERS = ("mamba1", "mamba2")
CPU_BACKENDS = ("torch", "cpu", "reference")
GPU_BACKENDS = ("torch", "gpu", "cuda")
GREEDY = SamplingSettings(temperature=0.0)
WARM = SamplingSettings(temperature=3.0, top_k=20)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40, 7, 7]]

WAITING_STEP = """
import torch
from mamba_dist.inference.graph import cuda_graph
counter = torch.zeros(1, device="cuda")
cuda_graph(lambda: counter.add_(1).item(), counter.device)
"""


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(no_device(test))


def opinionated_model(
    layer: str, *, backend: str = "torch", device: str = "cpu", tied: bool = False
) -> MambaLM:
    """Random weights with large logits, whose choices no rounding of fp32 can change.

    The head has weights of its own unless they are `tied`: the embedding's repeat the last token.
    """
    config = MambaConfig(
        layer=layer, d_model=32, n_layers=2, vocab_size=61, d_state=16, headdim=16, chunk_size=64,
        pad_vocab_size_multiple=64, initializer_range=1.0, tie_embeddings=tied,
    )  # fmt: skip
    with torch.device(device):
        model = MambaLM(config, backend=backend)
    initialize(model, config, seed=0, gather=lambda _: nullcontext())
    return model


def require(backend: str, device_type: str) -> None:
    (status,) = (s for s in describe_backends(device_type) if s.name == backend)
    if not status.available:
        pytest.skip(status.detail)


class Recorder:
    """Stands in for a capture: runs the step once, as a warm-up does, and repeats it when told."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
        assert device.type == "cpu"
        self.captured += 1
        compute()

        def replay() -> None:
            self.replayed += 1
            compute()

        return replay


def texts(
    model: MambaLM, sampling: SamplingSettings, *, steps: DecodingSteps | None = None, eos: int = -1
) -> list[list[int]]:
    settings = GenerationSettings(max_new_tokens=15, eos_id=eos, sampling=sampling)
    return generate(model, PROMPTS, settings, steps=steps)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_chain_of_static_steps_is_the_chain_of_eager_ones(
    layer: str, batch: int, backend: str
) -> None:
    require(backend, "cpu")
    model = opinionated_model(layer, backend=backend)
    tokens = torch.randint(0, 61, (6, batch), generator=torch.Generator().manual_seed(1))
    _, states = model.forward_with_state(tokens[:1].mT)
    before = [(s.conv.clone(), s.ssm.clone()) for s in states]
    step = DecodingStep(model, states, capture=Recorder())
    for token in tokens[1:]:
        found = step(token)
        logits, states = model.forward_with_state(token[:, None], states)
        assert torch.equal(found, logits[:, 0])
    assert all(s.ssm.abs().max() > 0 for s in states)
    # What it was made from still belongs to the caller, who can start it there again.
    again = DecodingStep(model, states, capture=Recorder())
    _, states = model.forward_with_state(tokens[:1].mT)
    for state, (conv, ssm) in zip(states, before, strict=True):
        assert torch.equal(state.conv, conv)
        assert torch.equal(state.ssm, ssm)
    again.load(states)
    expected, _ = model.forward_with_state(tokens[1][:, None], states)
    assert torch.equal(again(tokens[1]), expected[:, 0])


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_texts_by_captured_steps_are_those_of_eager_ones_ended_ones_included(
    layer: str, backend: str, sampling: SamplingSettings
) -> None:
    require(backend, "cpu")
    model = opinionated_model(layer, backend=backend)
    free = texts(model, sampling)
    assert all(len(set(text)) > 5 for text in free), "a text that repeats itself proves little"
    eos = free[0][4]
    recorder = Recorder()
    steps = DecodingSteps(model, capture=recorder)
    assert texts(model, sampling, steps=steps) == free
    assert recorder.replayed == 14
    ended = texts(model, sampling, steps=steps, eos=eos)
    assert ended == texts(model, sampling, eos=eos)
    assert len(ended[0]) < 15
    assert recorder.captured == 1


def test_a_batch_of_another_size_or_precision_is_captured_anew_and_the_old_one_kept() -> None:
    model, recorder = opinionated_model("mamba1"), Recorder()
    steps = DecodingSteps(model, capture=recorder)
    settings = GenerationSettings(max_new_tokens=3, sampling=GREEDY)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS, PROMPTS[:1]):
        generate(model, prompts, settings, steps=steps)
    assert recorder.captured == 2
    with torch.autocast("cpu", torch.bfloat16):
        rounded = generate(model, PROMPTS, settings, steps=steps)
        assert recorder.captured == 3
        assert rounded == generate(model, PROMPTS, settings)
    round_matrices(model)
    generate(model, PROMPTS, settings, steps=steps)
    assert recorder.captured == 4


def test_parameters_that_were_moved_are_captured_anew() -> None:
    model, recorder = opinionated_model("mamba1"), Recorder()
    steps = DecodingSteps(model, capture=recorder)
    settings = GenerationSettings(max_new_tokens=3, sampling=GREEDY)
    for _ in range(2):
        generate(model, PROMPTS, settings, steps=steps)
    assert recorder.captured == 1
    # As `model.to(...)` there and back leaves them: the same values at another address.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    generate(model, PROMPTS, settings, steps=steps)
    assert recorder.captured == 2


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_captured_steps_never_choose_ids_beyond_the_vocabulary(sampling: SamplingSettings) -> None:
    model = opinionated_model("mamba2")
    with torch.no_grad():
        # Every direction that the model can look in points to ids which must not come out.
        model.lm_head.weight[40:] *= 30
    steps = DecodingSteps(model, capture=Recorder())
    free = texts(model, sampling, steps=steps)
    assert min(max(text) for text in free) >= 40
    settings = GenerationSettings(15, vocab_size=40, sampling=sampling)
    found = generate(model, PROMPTS, settings, steps=steps)
    assert max(map(max, found)) < 40
    assert found == generate(model, PROMPTS, settings)


@pytest.mark.parametrize("graph", [True, False])
def test_steps_of_another_model_are_refused(graph: bool) -> None:
    model, other = opinionated_model("mamba1"), opinionated_model("mamba1")
    settings = GenerationSettings(max_new_tokens=3, graph=graph)
    with pytest.raises(ValueError, match="steps decode with the model that they were made for"):
        generate(model, PROMPTS, settings, steps=DecodingSteps(other, capture=Recorder()))


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("first", [True, False])
def test_steps_serve_inside_and_outside_of_inference_mode(
    first: bool, layer: str, sampling: SamplingSettings
) -> None:
    model, recorder = opinionated_model(layer), Recorder()
    expected = texts(model, sampling)
    steps = DecodingSteps(model, capture=recorder)
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            assert texts(model, sampling, steps=steps) == expected
    assert recorder.captured == 1


def test_buffers_of_a_step_belong_to_no_mode_and_no_graph_of_gradients() -> None:
    model = opinionated_model("mamba1")
    with torch.inference_mode():
        _, states = model.forward_with_state(torch.tensor([[3, 9]]))
        step = DecodingStep(model, states, capture=Recorder())
        logits = step(torch.tensor([4]))
    assert not logits.is_inference()
    # States that carry gradients are copied without them.
    _, states = model.forward_with_state(torch.tensor([[3, 9]]))
    assert states[0].ssm.requires_grad
    for made in (step, DecodingStep(model, states, capture=Recorder())):
        made.load(states)
        assert not any(state.ssm.requires_grad for state in made._states)
        found = made(torch.tensor([4]))
        assert not found.requires_grad
        torch.testing.assert_close(found, logits)


def test_a_single_token_needs_no_step() -> None:
    model, recorder = opinionated_model("mamba1"), Recorder()
    steps = DecodingSteps(model, capture=recorder)
    settings = GenerationSettings(max_new_tokens=1, sampling=GREEDY)
    found = generate(model, PROMPTS, settings, steps=steps)
    assert found == [text[:1] for text in texts(model, GREEDY)]
    assert recorder.captured == 0


def test_texts_that_grow_at_the_same_time_do_not_share_states() -> None:
    model, recorder = opinionated_model("mamba2"), Recorder()
    steps = DecodingSteps(model, capture=recorder)
    settings = GenerationSettings(max_new_tokens=8, sampling=WARM)
    alone = [list(stream(model, [prompt], settings)) for prompt in PROMPTS[:2]]
    first, second = (stream(model, [prompt], settings, steps=steps) for prompt in PROMPTS[:2])
    assert [list(pair) for pair in zip(*zip(first, second, strict=True), strict=True)] == alone
    assert recorder.captured == 2


def test_a_text_that_nobody_reads_to_its_end_gives_its_step_back() -> None:
    model, recorder = opinionated_model("mamba1"), Recorder()
    steps = DecodingSteps(model, capture=recorder)
    settings = GenerationSettings(max_new_tokens=8, sampling=GREEDY)
    for _ in range(2):
        abandoned = stream(model, [[3]], settings, steps=steps)
        next(abandoned)
        abandoned.close()
    assert recorder.captured == 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_are_an_error_with_captured_steps_too(
    sampling: SamplingSettings,
) -> None:
    model = opinionated_model("mamba1")
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    with pytest.raises(ModelError, match="logits are not finite"):
        texts(model, sampling, steps=DecodingSteps(model, capture=Recorder()))


def test_a_cpu_decodes_without_a_graph_and_says_so_at_info_level(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="mamba_dist")
    texts(opinionated_model("mamba1"), GREEDY)
    assert [r.message for r in caplog.records] == [
        "decoding without a CUDA graph: the model is on cpu"
    ]


def test_settings_without_a_graph_leave_captured_steps_alone() -> None:
    model, recorder = opinionated_model("mamba1"), Recorder()
    settings = GenerationSettings(max_new_tokens=3, graph=False)
    generate(model, PROMPTS, settings, steps=DecodingSteps(model, capture=recorder))
    assert recorder.captured == 0


def test_a_graph_for_another_device_is_refused() -> None:
    model = opinionated_model("mamba1")
    with pytest.raises(BackendError, match="the model is on cpu; decode without one by --no-graph"):
        texts(model, GREEDY, steps=DecodingSteps(model))


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_rounded_matrices_compute_what_autocast_computes_from_fp32_ones(layer: str) -> None:
    model = opinionated_model(layer, tied=True)
    embedding = model.backbone.embedding.weight
    # The stream begins with its values, which autocast leaves alone.
    embedding.copy_(embedding.bfloat16())
    tokens = torch.tensor([[3, 9, 27, 4]])
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = model.forward_with_state(tokens)
    found, states = round_matrices(model).forward_with_state(tokens)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert {part.dtype for s in states for part in (s.conv, s.ssm)} == {torch.float32}
    assert model.lm_head.weight is model.backbone.embedding.weight


@torch.no_grad()
def test_rounding_spares_what_no_product_reads() -> None:
    config = MambaConfig(
        d_model=16, n_layers=1, vocab_size=20, proj_bias=True, tie_embeddings=False
    )
    model = round_matrices(MambaLM(config))
    wide = {n.removeprefix("backbone.layers.0.") for n, p in model.named_parameters()
            if p.dtype == torch.float32}  # fmt: skip
    assert wide == {
        "norm.weight", "mixer.A_log", "mixer.D", "mixer.dt_proj.bias", "mixer.conv1d.weight",
        "mixer.conv1d.bias", "backbone.norm_f.weight",
    }  # fmt: skip


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
@on_gpu
def test_a_graph_gives_the_texts_of_the_eager_path(
    layer: str, backend: str, sampling: SamplingSettings
) -> None:
    require(backend, "cuda")
    model = opinionated_model(layer, backend=backend, device="cuda")
    for _ in range(2):
        settings = GenerationSettings(40, sampling=sampling)
        eager = generate(model, PROMPTS, GenerationSettings(40, sampling=sampling, graph=False))
        steps = DecodingSteps(model)
        assert generate(model, PROMPTS, settings) == eager
        for _ in range(2):
            assert generate(model, PROMPTS, settings, steps=steps) == eager
        round_matrices(model)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
@on_gpu
@torch.no_grad()
def test_a_chain_of_replays_is_the_chain_of_eager_steps(layer: str, backend: str) -> None:
    require(backend, "cuda")
    model = opinionated_model(layer, backend=backend, device="cuda")
    tokens = torch.randint(0, 61, (20, 3), generator=torch.Generator().manual_seed(1)).cuda()
    _, states = model.forward_with_state(tokens[:1].mT)
    step = DecodingStep(model, states)
    for token in tokens[1:]:
        found = step(token)
        logits, states = model.forward_with_state(token[:, None], states)
        torch.testing.assert_close(found[:, :61], logits[:, 0, :61], rtol=1e-5, atol=1e-5)


@on_gpu
def test_a_step_that_waits_for_the_device_is_refused_with_the_reason() -> None:
    # In a process of its own: a capture that failed leaves torch's generators unusable.
    result = subprocess.run(
        [sys.executable, "-c", WAITING_STEP], capture_output=True, text=True, timeout=200
    )
    assert "BackendError: a decoding step cannot be captured as a CUDA graph" in result.stderr
    assert "--no-graph" in result.stderr
