"""tools/generate.py on a real checkpoint with a real tokenizer."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mamba_dist.checkpoint.manifest import Progress, TokenizerRecord
from mamba_dist.checkpoint.store import Snapshot, save_checkpoint
from mamba_dist.commands import generate as command
from mamba_dist.commands.generate import main
from mamba_dist.config.schema import DataConfig, MambaConfig, RunConfig, TrainingConfig
from mamba_dist.data.tokenization import load_tokenizer, train_bpe
from mamba_dist.engine.base import Fragment
from mamba_dist.inference.generate import GenerationSettings
from mamba_dist.model.init import initialize
from mamba_dist.model.lm import MambaLM

SCRIPT = Path(__file__).parents[2] / "tools" / "generate.py"
CORPUS = ["def main() -> int:\n    return 0\n", "für Elise, “quoted” – 東京\n"] * 20


class OneRank:
    rank = 0
    size = 1

    def any_rank(self, flag: bool) -> bool:
        return flag


def write_checkpoint(run_dir: Path, tokenizer: Path, *, vocab_size: int) -> Path:
    config = RunConfig(
        model=MambaConfig(
            d_model=32, n_layers=2, vocab_size=vocab_size, d_state=8, initializer_range=1.0
        ),
        training=TrainingConfig(global_batch_size=32, max_steps=2000),
        data=DataConfig(tokenizer_path=str(tokenizer)),
    )
    model = MambaLM(config.model)
    initialize(model, config.model, seed=0, gather=lambda _: nullcontext())
    fragments = [
        Fragment(name, tuple(p.shape), 0, *(3 * [p.detach().flatten()]))
        for name, p in model.named_parameters()
    ]
    progress = Progress(
        step=7, next_sample=224, trained_tokens=100, global_batch_size=32, data_fingerprint="none"
    )
    made_with = TokenizerRecord(
        sha256=load_tokenizer(tokenizer).identity.sha256, eos_token="<|endoftext|>"
    )
    snapshot = Snapshot(
        progress, 7, fragments, config, made_with, "zero", {"torch": torch.__version__}
    )
    return save_checkpoint(run_dir, snapshot, ranks=OneRank())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe(CORPUS, vocab_size=300), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, tokenizer, vocab_size=load_tokenizer(tokenizer).vocab_size)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_prompt_is_continued_and_the_seed_repeats_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run_dir, "--prompt", "def main", "--max-new-tokens", 20, "--temperature", 5)
    text = printed(capsys, *arguments, "--seed", 3)
    assert text.startswith("def main")
    assert len(text) > len("def main\n")
    assert printed(capsys, *arguments, "--seed", 3) == text
    assert printed(capsys, *arguments, "--seed", 4) != text


def test_a_run_folder_and_its_newest_checkpoint_give_the_same_text(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "return", "--temperature", 0)
    checkpoint = next((run_dir / "checkpoints").iterdir())
    assert printed(capsys, run_dir, *options) == printed(capsys, checkpoint, *options)


def test_the_only_text_appears_token_by_token_as_the_first_of_several_would(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (run_dir, "--prompt", "東", "--max-new-tokens", 60, "--temperature", 3)
    streamed = printed(capsys, *arguments).removesuffix("\n")
    whole = printed(capsys, *arguments, "--num-samples", 2)
    assert whole.startswith(f"[1/2] {streamed}\n[2/2] 東")


def test_characters_that_span_tokens_appear_once_they_are_complete(
    run_dir: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [ids] = load_tokenizer(tokenizer).encode_batch(["日本語 naïve"])
    assert len(ids) > len("日本語 naïve")
    monkeypatch.setattr(command, "stream", lambda *_: ((int(i),) for i in ids))
    assert printed(capsys, run_dir, "--prompt", "x") == "x日本語 naïve\n"


def test_only_ids_that_the_tokenizer_has_are_allowed_and_its_eos_ends_a_text(
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_checkpoint(tmp_path, tokenizer, vocab_size=1000)
    seen: list[GenerationSettings] = []
    monkeypatch.setattr(
        command,
        "generate",
        lambda _, prompts, settings: seen.append(settings) or [[]] * len(prompts),
    )
    printed(capsys, tmp_path, "--prompt", "x", "--num-samples", 2, "--top-k", 5, "--top-p", 0.5)
    loaded = load_tokenizer(tokenizer)
    assert (seen[0].vocab_size, seen[0].eos_id) == (loaded.vocab_size, loaded.eos_id)
    assert (seen[0].sampling.top_k, seen[0].sampling.top_p) == (5, 0.5)


@pytest.mark.parametrize(
    ("options", "dtype", "graph"),
    [((), torch.float32, True), (("--precision", "bf16", "--no-graph"), torch.bfloat16, False)],
)
def test_precision_and_graph_are_as_asked_for(
    options: tuple[str, ...],
    dtype: torch.dtype,
    graph: bool,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def stand_in(model: MambaLM, prompts: object, settings: GenerationSettings) -> list[list[int]]:
        seen.append((model.lm_head.weight.dtype, settings.graph))
        return [[], []]

    monkeypatch.setattr(command, "generate", stand_in)
    printed(capsys, run_dir, "--prompt", "x", "--num-samples", 2, *options)
    assert seen == [(dtype, graph)]


def test_every_prompt_gets_its_number_of_samples(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ("--prompt", "def", "--prompt", "return 0")
    text = printed(capsys, run_dir, *prompts, "--num-samples", 2, "--max-new-tokens", 3)
    for start in ("[1/4] def", "[2/4] def", "[3/4] return 0", "[4/4] return 0"):
        assert start in text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "'-1' is not a number from 0"),
        ("--temperature", "nan", "'nan' is not a number from 0"),
        ("--top-k", "0", "'0' is not a whole number from 1"),
        ("--top-p", "1.5", "'1.5' is not a number above 0 and at most 1"),
        ("--max-new-tokens", "ten", "'ten' is not a whole number from 1"),
        ("--seed", "-3", "'-3' is not a whole number from 0 below 2**63"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_loaded(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["no/such/run", "--prompt", "x", f"{option}={value}"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_one_line_on_stderr(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--prompt", "x"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}: no whole checkpoint found")
    assert result.stderr.count("\n") == 1


def test_a_missing_tokenizer_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = failed(capsys, run_dir, "--prompt", "x", "--tokenizer", "elsewhere/tokenizer.json")
    assert "tokenizer elsewhere/tokenizer.json does not exist" in error


def test_another_tokenizer_than_the_one_trained_with_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(train_bpe(CORPUS, vocab_size=290), encoding="utf-8")
    error = failed(capsys, run_dir, "--prompt", "x", "--tokenizer", other)
    assert "the model was trained with" in error


def test_an_empty_prompt_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "--prompt", "x", "--prompt", ""]) == 2
    assert "error: prompt 2 has no tokens" in capsys.readouterr().err
