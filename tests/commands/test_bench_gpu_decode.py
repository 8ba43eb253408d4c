"""tools/bench.py gpu-decode, tried out on a CPU and on what it is compared with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_script

from mamba_dist.commands import bench
from mamba_dist.commands.bench import gpu_decode
from mamba_dist.errors import BackendError

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
    assert "**graph: not measured**: BackendError: CUDA graphs need a CUDA device" in text


class Theirs(torch.nn.Module):
    """A language model with mamba-ssm's names that continues every text by the prompt's end."""

    def __init__(self, shape: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, device
        self.loaded: dict[str, torch.Tensor] = {}
        self.calls: list[dict[str, Any]] = []

    def load_state_dict(self, state: dict[str, torch.Tensor], strict: bool) -> Any:  # type: ignore[override]
        self.loaded = state
        names = ["lm_head.weight"] if self.shape["tie_embeddings"] else []
        return torch.nn.modules.module._IncompatibleKeys(names, [])

    def generate(self, input_ids: torch.Tensor, max_length: int, **options: Any) -> torch.Tensor:
        self.calls.append(options)
        more = max_length - input_ids.shape[1]
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, more)], dim=1)


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
def test_the_peer_gets_our_weights_prompts_and_shape_and_a_ratio_is_shown(
    layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Theirs] = []

    def make(shape: dict[str, Any], **options: Any) -> Theirs:
        made.append(Theirs(shape, **options))
        return made[-1]

    monkeypatch.setattr(gpu_decode, "mamba_lm_head_model", lambda: (make, dict))
    options = ("--batch", "2", "1", "--variants", "eager,mamba-ssm", "--rounds", "1")
    code, text = bench_main(capsys, "--config", config(tmp_path, layer), *TINY, *options)
    assert code == 0, text
    [theirs] = made
    assert theirs.dtype == torch.bfloat16
    assert theirs.shape["vocab_size"] == 56
    assert theirs.shape["ssm_cfg"]["layer"] == layer.capitalize()
    assert theirs.loaded["backbone.layers.1.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert theirs.calls == [{"top_k": 1, "cg": True, "vocab_size": 50}] * 6
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| mamba-ssm |")]
    assert [row[4].strip() for row in rows] == ["1.00 (1.00–1.00)"] * 2


def test_a_peer_that_cannot_be_imported_leaves_ours_without_a_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise BackendError("no mamba_ssm here")

    monkeypatch.setattr(gpu_decode, "mamba_lm_head_model", missing)
    options = ("--batch", "1", "--variants", "mamba-ssm,eager", "--rounds", "1")
    code, text = bench_main(capsys, "--config", config(tmp_path), *TINY, *options)
    assert code == 1
    [row] = [line.split("|") for line in text.splitlines() if line.startswith("| eager |")]
    assert row[4].strip() == ""
    assert "**mamba-ssm: not measured**: BackendError: no mamba_ssm here" in text


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
