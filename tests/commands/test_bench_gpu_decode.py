"""tools/bench.py gpu-decode, tried out on a CPU and on what it is compared with."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_script

from mamba_dist.commands import bench
from mamba_dist.commands.bench.gpu import decode as gpu_decode
from mamba_dist.commands.bench.gpu import decode_models as gpu_decode_models
from mamba_dist.commands.bench.gpu import peer_model as gpu_peer_model
from mamba_dist.commands.bench.gpu.decode import timed
from mamba_dist.commands.bench.gpu.decode_models import Models, Shape
from mamba_dist.commands.bench.gpu.decode_report import Decoded
from mamba_dist.config.load import load_config
from mamba_dist.config.schema import MambaConfig
from mamba_dist.errors import BackendError
from mamba_dist.inference.generate import GenerationSettings, generate
from mamba_dist.inference.graph import DecodingSteps
from mamba_dist.inference.precision import round_matrices
from mamba_dist.inference.sampling import SamplingSettings
from mamba_dist.model.lm import MambaLM

SCRIPT = "tools/bench.py"
CONFIG = """
schema_version: 2
model: {layer: LAYER, d_model: 32, n_layers: 2, vocab_size: 50, d_state: 16, headdim: 16}
training: {micro_batch_size: 1, global_batch_size: 1, max_steps: 1, warmup_steps: 0}
"""
TINY = ("--prompt", "5", "--new-tokens", "4", "--device", "cpu")


def config(folder: Path, layer: str = "mamba1") -> str:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("LAYER", layer))
    return str(path)


def test_every_batch_gets_a_table_and_the_same_figures_are_written(tmp_path: Path) -> None:
    options = ("--batch", "1", "3", *TINY, "--json", "found.json")
    result = run_script(SCRIPT, "gpu-decode", "--config", config(tmp_path), *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"torch {torch.__version__}" in result.stdout
    first, second = result.stdout.split("### ")[1:]
    assert first.startswith("batch 1, prompt 5, 4 new tokens")
    assert second.startswith("batch 3, prompt 5, 4 new tokens")
    document = json.loads((tmp_path / "found.json").read_text())
    for text, record in zip((first, second), document["records"], strict=True):
        [row] = [line for line in text.splitlines() if line.startswith("| eager |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        median = record["seconds_per_token"]["median"]
        assert float(cells[1].split()[0]) == pytest.approx(median * 1e3, rel=1e-3)
        assert record["tokens_per_s"] == pytest.approx(record["batch"] / median)
        bound_s = document["weight_bytes"] / document["copy_bytes_per_s"]
        assert record["share_of_bound"] == pytest.approx(bound_s / median)
        assert record["common_tokens"] == 4


def bench_main(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = bench.main(["gpu-decode", *words])
    return code, capsys.readouterr().out


def test_a_variant_that_cannot_run_is_named_with_the_reason_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = bench_main(
        capsys, "--config", config(tmp_path), *TINY, "--batch", "1", "--variants", "eager,graph"
    )
    assert code == 1
    assert "| eager |" in text
    assert "| graph |" not in text
    assert "**graph: not measured**: CUDA graphs need a CUDA device" in text


class Theirs(torch.nn.Module):
    """mamba-ssm's model, made of ours: its names, its call, and its cache of one batch size."""

    def __init__(self, shape: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.loaded: dict[str, torch.Tensor] = {}
        self.calls: list[dict[str, Any]] = []
        self._decoding_cache: int | None = None

    def load_state_dict(self, state: dict[str, torch.Tensor], strict: bool) -> Any:  # type: ignore[override]
        self.loaded = state
        names = ["lm_head.weight"] if self.shape["tie_embeddings"] else []
        return torch.nn.modules.module._IncompatibleKeys(names, [])

    def generate(self, input_ids: torch.Tensor, max_length: int, **options: Any) -> torch.Tensor:
        self.calls.append(options)
        assert self._decoding_cache in (None, len(input_ids)), "its cache is of another batch"
        self._decoding_cache = len(input_ids)
        new = max_length - input_ids.shape[1]
        texts = generate(self._ours(), input_ids.tolist(), greedily(new))
        return torch.cat([input_ids, torch.tensor(texts)], dim=1)

    def _ours(self) -> MambaLM:
        mixer = self.shape["ssm_cfg"]
        model = MambaLM(
            MambaConfig(
                layer=mixer["layer"].lower(),
                d_model=self.shape["d_model"],
                n_layers=self.shape["n_layer"],
                vocab_size=self.shape["vocab_size"],
                d_state=mixer["d_state"],
                headdim=mixer.get("headdim", 64),
            )
        )
        round_matrices(model).load_state_dict(self.loaded, strict=False)
        return model


def greedily(tokens: int) -> GenerationSettings:
    return GenerationSettings(tokens, sampling=SamplingSettings(temperature=0.0), graph=False)


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_the_peer_gets_our_weights_prompts_and_shape_and_a_ratio_is_shown(
    layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Theirs] = []

    def make(shape: dict[str, Any], **options: Any) -> Theirs:
        made.append(Theirs(shape, **options))
        return made[-1]

    monkeypatch.setattr(gpu_peer_model, "mamba_lm_head_model", lambda: (make, dict))
    # A batch of another size comes with the cache of the one before.
    options = ("--batch", "2", "1", "--variants", "eager,mamba-ssm", "--rounds", "1")
    code, text = bench_main(capsys, "--config", config(tmp_path, layer), *TINY, *options)
    assert code == 0, text
    [theirs] = made
    assert theirs.dtype == torch.bfloat16
    assert (theirs.shape["vocab_size"], theirs.shape["pad_vocab_size_multiple"]) == (50, 8)
    assert theirs.shape["ssm_cfg"]["layer"] == layer.capitalize()
    assert theirs.loaded["backbone.layers.1.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert {str(call) for call in theirs.calls} == {str({"top_k": 1, "cg": True, "vocab_size": 50})}
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| mamba-ssm |")]
    assert [row[4].strip() for row in rows] == ["1.00 (1.00–1.00)"] * 2


def test_a_peer_that_cannot_be_imported_leaves_ours_without_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise BackendError("no mamba_ssm here")

    monkeypatch.setattr(gpu_peer_model, "mamba_lm_head_model", missing)
    options = ("--batch", "1", "--variants", "mamba-ssm,eager", "--rounds", "1")
    code, text = bench_main(capsys, "--config", config(tmp_path), *TINY, *options)
    assert code == 1
    [row] = [line.split("|") for line in text.splitlines() if line.startswith("| eager |")]
    assert row[4].strip() == ""
    assert "**mamba-ssm: not measured**: no mamba_ssm here" in text


def test_a_peer_that_cannot_have_our_shape_is_no_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, gpu = load_config(config(tmp_path)).config.model, torch.device("cuda")
    assert gpu_decode._default_variants(model, gpu) == ("eager", "mamba-ssm", "graph")
    other = model.model_copy(update={"norm_eps": 1e-6})
    assert gpu_decode._default_variants(other, gpu) == ("eager", "graph")
    assert (
        "mamba-ssm is left out: mamba-ssm's model has a fixed norm_eps" in capsys.readouterr().err
    )


def test_ratios_are_the_peers_time_over_the_variants_within_rounds() -> None:
    rounds = [{"eager": 1.0, "mamba-ssm": 3.0}, {"eager": 2.0, "mamba-ssm": 8.0}]
    found = Decoded(Shape(1, 5, 4), ("eager", "mamba-ssm"), list(rounds))
    over = found.speed_over_peer("eager")
    assert over is not None
    assert (over.low, over.high) == (3.0, 4.0)
    found.wrong["mamba-ssm"] = "it writes nonsense"
    assert found.speed_over_peer("eager") is None


def test_the_time_of_a_token_is_that_of_all_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(gpu_decode, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def decode(count: int) -> list[list[int]]:
        # The prompt takes five seconds, and each token a half.
        now[0] += 5.0 + 0.5 * count
        return [[7] * count]

    assert timed(decode, 9) == (0.5, [[7]], [[7] * 9])


@pytest.mark.parametrize(("times", "code"), [((-1.0, 0.0, -2.0), 1), ((-1.0, 0.5), 0)])
def test_a_token_that_takes_no_time_is_measured_again_and_then_refused(
    times: tuple[float, ...],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = iter(times)
    monkeypatch.setattr(
        gpu_decode, "timed", lambda decode, count: (next(left), decode(1), decode(count))
    )
    options = ("--batch", "1", "--rounds", "1")
    found, text = bench_main(capsys, "--config", config(tmp_path), *TINY, *options)
    assert found == code
    refused = "**eager: not measured**: 4 tokens took less time than the first one alone, 3 times"
    assert (refused in text) == bool(code)
    assert ("| eager |" in text) == (not code)


def repeated(compute: Any, device: torch.device) -> Any:
    compute()
    return compute


def forgetful(compute: Any, device: torch.device) -> Any:
    """A capture whose replays all start from the SSM states of the first one."""
    step = compute.__self__
    compute()
    kept: list[Any] = []

    def replay() -> None:
        if not kept:
            kept.extend(state.ssm.clone() for state in step._states)
        for state, ssm in zip(step._states, kept, strict=True):
            state.ssm.copy_(ssm)
        compute()

    return replay


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("capture", [repeated, forgetful])
def test_a_graph_that_writes_something_else_has_no_speed(
    capture: Any,
    layer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        gpu_decode_models, "DecodingSteps", lambda model: DecodingSteps(model, capture=capture)
    )
    size = ("--prompt", "5", "--new-tokens", "20", "--device", "cpu", "--batch", "2")
    options = (*size, "--variants", "eager,graph", "--json", str(tmp_path / "found.json"))
    code, text = bench_main(capsys, "--config", config(tmp_path, layer), *options)
    is_right = capture is repeated
    assert code == (0 if is_right else 1), text
    assert "| eager |" in text
    assert ("| graph |" in text) == is_right
    assert ("**graph: wrong, so it has no speed**: token " in text) == (not is_right)
    _, graph = json.loads((tmp_path / "found.json").read_text())["records"]
    assert ("seconds_per_token" in graph) == is_right


def test_a_variant_that_goes_wrong_in_a_later_round_loses_its_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_decode.timed
    turns = []

    def later_nonsense(decode: Any, count: int) -> Any:
        turns.append(count)
        token_s, first, texts = right(decode, count)
        if len(turns) == 3:
            texts = [[(text[0] + 25) % 50, *text[1:]] for text in texts]
        return token_s, first, texts

    monkeypatch.setattr(gpu_decode, "timed", later_nonsense)
    options = ("--batch", "1", "--rounds", "9")
    code, text = bench_main(capsys, "--config", config(tmp_path), *TINY, *options)
    assert code == 1
    assert "| eager |" not in text
    assert "**eager: wrong, so it has no speed**: token 1 of a text is " in text


def models(folder: Path, layer: str = "mamba2") -> Models:
    return Models(load_config(config(folder, layer)).config.model, "torch", torch.device("cpu"))


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_the_judge_takes_a_near_tie_and_no_other_choice(layer: str, tmp_path: Path) -> None:
    made, shape = models(tmp_path, layer), Shape(1, 5, 12)
    [text] = made.decode("eager", shape)(12)
    assert len(set(text)) > 3, "a text that repeats one token proves little"
    weight = made._ours.backbone.embedding.weight
    other = next(token for token in range(50) if token not in text)
    with torch.no_grad():
        weight[other] = weight[text[0]] * 0.995
    prompt = made.prompt(5).tolist()
    [rest] = generate(made._ours, [[*prompt, other]], greedily(11))
    judge = made.judge("eager", shape)
    assert judge.objection([[other, *rest]], 12) is None
    # A peer rounds elsewhere, and may lie further apart; not as far as something else would.
    for factor, peer_is_right in ((0.85, True), (0.6, False)):
        with torch.no_grad():
            weight[other] = weight[text[0]] * factor
        assert made.judge("eager", shape).objection([[other]], 1) is not None
        is_right = made.judge("mamba-ssm", shape).objection([[other]], 1) is None
        assert is_right == peer_is_right
    objection = made.judge("eager", shape).objection([[other, *rest]], 12)
    assert "lies below the model's choice" in str(objection)
    assert judge.objection([[text[1], *text[1:]]], 12) is not None


def test_the_judge_wants_as_many_texts_and_tokens_as_were_asked_for(tmp_path: Path) -> None:
    made = models(tmp_path)
    [right] = made.decode("eager", Shape(1, 5, 2))(2)
    judge = made.judge("eager", Shape(2, 5, 2))
    assert judge.objection([right, right], 2) is None
    for texts, reason in (
        ([right, right[:1]], "2 texts of 1, 2 tokens, expected 2 of 2"),
        ([right], "1 texts of 2 tokens, expected 2 of 2"),
        ([right, [1, 50]], "a text has token ids 1 to 50, the model 0 to 49"),
    ):
        assert judge.objection(texts, 2) == reason


def test_a_failure_in_a_later_turn_ends_that_variant_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = Models.decode, []

    def decode(self: Models, variant: str, shape: Shape) -> Any:
        if variant == "eager":
            return right(self, variant, shape)

        def dies_later(count: int) -> list[list[int]]:
            calls.append(count)
            if len(calls) > 3:
                raise RuntimeError("CUDA error: launch failed")
            return right(self, "eager", shape)(count)

        return dies_later

    monkeypatch.setattr(Models, "decode", decode)
    options = ("--batch", "1", "--variants", "graph,eager", "--rounds", "3")
    json_file = tmp_path / "found.json"
    code, text = bench_main(
        capsys, "--config", config(tmp_path), *TINY, *options, "--json", str(json_file)
    )
    assert code == 1
    assert "| eager |" in text
    assert "**graph: not measured**: RuntimeError: CUDA error: launch failed" in text
    graph, eager = json.loads(json_file.read_text())["records"]
    assert graph["absent"] == "RuntimeError: CUDA error: launch failed"
    assert eager["seconds_per_token"]["median"] > 0


def test_an_interrupted_run_still_writes_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Models.decode

    def decode(self: Models, variant: str, shape: Shape) -> Any:
        if shape.batch == 2:
            raise KeyboardInterrupt
        return right(self, variant, shape)

    monkeypatch.setattr(Models, "decode", decode)
    json_file = tmp_path / "found.json"
    options = ("--batch", "1", "2", "--json", str(json_file))
    code, _ = bench_main(capsys, "--config", config(tmp_path), *TINY, *options)
    assert code == 130
    first, second = json.loads(json_file.read_text())["records"]
    assert first["seconds_per_token"]["median"] > 0
    assert second["absent"] == "it did not come to its turn"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_machine_without_a_gpu_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["gpu-decode", "--config", config(tmp_path)]) == 2
    assert "torch sees no GPU here; --device cpu tries the tool out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "fast"], "--variants: fast unknown here, expected eager, mamba-ssm, graph"),
        (["--variants", ""], "--variants: '' is not names with commas between"),
        (["--new-tokens", "1"], "--new-tokens 1: the first token comes with the prompt"),
        (["--batch", "0"], "0 is not a positive number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(["gpu-decode", "--config", "absent.yaml", *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
