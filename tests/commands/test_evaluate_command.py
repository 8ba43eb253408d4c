"""tools/evaluate.py: what it needs of the data of a run."""

from pathlib import Path

import pytest
import yaml
from made_dataset import MadeDataset
from saved_run import save_run

from mamba_dist.commands.evaluate import main
from mamba_dist.commands.plan_packing import main as plan_packing
from mamba_dist.config.load import load_config
from mamba_dist.data.training_sources import new_run, open_sources
from mamba_dist.model.lm import MambaLM


@pytest.fixture
def run(made: MadeDataset, tmp_path: Path) -> Path:
    """The folder of a run whose samples come from a plan, which has gone since."""
    document = {
        "schema_version": 2,
        "model": {"d_model": 16, "n_layers": 1, "vocab_size": 512},
        "training": {
            "max_steps": 2,
            "warmup_steps": 0,
            "global_batch_size": 2,
            "micro_batch_size": 1,
        },
        "data": {
            "dataset_path": str(made.folder),
            "tokenizer_path": str(made.folder / "tokenizer.json"),
            "sequence_length": 32,
            "packing": "pad",
            "train_split": 0.8,
            "val_split": 0.2,
        },
    }
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    assert plan_packing(["--config", str(folder / "config.yaml")]) == 0
    config = load_config(folder / "config.yaml").config
    order = new_run(open_sources(config.data), config.data, global_batch_size=2).order
    model = MambaLM(config.model, backend="reference")
    save_run(folder, config, order, step=2, parameters=dict(model.named_parameters()))
    for plan in made.folder.glob("*.plan"):
        plan.unlink()
    return folder


def test_validation_needs_no_plan_and_baselines_say_which(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "--max-sequences", "2"]) == 0
    assert "step 2: validation loss" in capsys.readouterr().out
    assert main([str(run), "--max-sequences", "2", "--baselines"]) == 2
    captured = capsys.readouterr()
    assert "python tools/plan_packing.py" in captured.err
    assert "validation loss" not in captured.out
    assert not (run / "summary.json").exists()
