import re
import shutil
from pathlib import Path

import pytest
import yaml
from made_dataset import MadeDataset
from processes import run_script

from mamba_dist.commands.plan_packing import main
from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.packing_plan import open_plan, plan_key
from mamba_dist.data.samples import training_samples


def write_config(folder: Path, made: MadeDataset, **data: object) -> Path:
    path = folder / "config.yaml"
    content = {
        "schema_version": 2,
        "training": {"max_steps": 2000, "gradient_accumulation_steps": 1},
        "data": {"dataset_path": str(made.folder), "sequence_length": 64, **data},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_script_makes_the_plan_and_says_what_it_costs(made: MadeDataset) -> None:
    folder = made.folder
    words = (folder, "--packing", "best_fit", "--sequence-length", "64")
    result = run_script("tools/plan_packing.py", *words, cwd=folder)
    assert result.returncode == 0, result.stderr
    dataset = open_dataset(folder)
    totals = open_plan(folder, plan_key(dataset.fingerprint, "best_fit", 64)).totals
    first, second = result.stdout.splitlines()
    counts = f"{totals.samples} sequences of 64 for {dataset.manifest.documents('train')} documents"
    assert first.startswith(f"{folder}/train-best_fit-64.plan: {counts}, 0.0 MB in ")
    assert second == (
        f"{100 * totals.unlabelled_share(64):.3f} % of the positions are padding; "
        f"{100 * totals.cut_share:.2f} % of the documents are longer and cut"
    )


def test_a_config_says_it_all_and_single_words_go_before_it(
    made: MadeDataset, tmp_path: Path
) -> None:
    config = write_config(tmp_path, made, packing="pad")
    assert main(["--config", str(config)]) == 0
    options = ("--packing", "best_fit", "--sequence-length", "32")
    assert main([str(made.folder), "--config", str(config), *options]) == 0
    names = sorted(path.name for path in made.folder.glob("*.plan"))
    assert names == ["train-best_fit-32.plan", "train-pad-64.plan"]
    dataset = open_dataset(made.folder)
    assert len(training_samples(dataset, packing="pad", length=64)) > 100


def test_every_data_set_of_a_mixture_gets_its_plan(made: MadeDataset, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.folder, other)
    config = tmp_path / "config.yaml"
    data = {"sources": [{"path": str(made.folder)}, {"path": str(other)}], "packing": "pad"}
    training = {"max_steps": 2000, "gradient_accumulation_steps": 1}
    config.write_text(yaml.safe_dump({"schema_version": 2, "training": training, "data": data}))
    assert main(["--config", str(config)]) == 0
    assert (made.folder / "train-pad-2048.plan").is_file()
    assert (other / "train-pad-2048.plan").is_file()


def test_comparing_prints_a_line_for_each_mode_and_writes_nothing(
    made: MadeDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(made.folder.iterdir())
    assert main([str(made.folder), "--sequence-length", "64", "--compare"]) == 0
    assert sorted(made.folder.iterdir()) == before
    lines = capsys.readouterr().out.splitlines()
    number = r"([\d.,]+)"
    found = {
        match[1]: [float(text.replace(",", "")) for text in match.groups()[1:]]
        for line in lines
        if (match := re.match(rf"(\w+) +{number} +{number} % +{number} %$", line))
    }
    assert list(found) == ["concat", "best_fit", "pad"]
    tokens = open_dataset(made.folder).manifest.tokens("train")
    assert found["concat"][0] == (tokens - 1) // 64
    assert found["best_fit"][0] < found["pad"][0]
    assert found["best_fit"][1] < found["pad"][1]
    assert found["concat"][2] > found["best_fit"][2] == found["pad"][2]


def test_concat_needs_no_plan(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config(tmp_path, made_once))]) == 2
    assert "error: packing concat needs no plan" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--sequence-length", "64"], ["somewhere"]])
def test_a_command_without_a_place_or_a_length_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert (
        "give --config, or the data set's folder and --sequence-length" in capsys.readouterr().err
    )


def test_a_folder_that_is_no_data_set_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--packing", "pad", "--sequence-length", "64"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no manifest.json")
