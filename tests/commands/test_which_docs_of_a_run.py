"""tools/which_docs.py --step: the documents behind a step, in a mixture that changes on the way."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_dataset import MadeDataset
from saved_run import save_run

from mamba_dist.commands.which_docs import main
from mamba_dist.config.load import load_config
from mamba_dist.data.segments import RunOrder
from mamba_dist.data.training_sources import new_run, open_sources, source_records

LENGTH, BATCH = 64, 4


def which(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*map(str, words), "--tokens", "0"]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def write_config(folder: Path, data: dict[str, Any], batch: dict[str, int] | None = None) -> Path:
    training = {
        "max_steps": 2000,
        "micro_batch_size": 1,
        "run_dir": str(folder),
        **(batch or {"global_batch_size": BATCH}),
    }
    document = {"schema_version": 2, "training": training, "data": {**data, "num_workers": 0}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder


def mixed(*paths: Path) -> dict[str, Any]:
    weights = [3, 1]
    sources = [{"path": str(path), "weight": w} for path, w in zip(paths, weights, strict=True)]
    return {"sources": sources, "sequence_length": LENGTH, "seed": 5}


def named_samples(printed: str) -> list[tuple[int, str, int, int]]:
    """(position, data set, epoch, sample id) of each sample printed."""
    found = re.findall(
        r"^sample (\d+) of the run: (?:(\S+), )?epoch (\d+), sample id (\d+)$", printed, re.M
    )
    return [(int(p), folder, int(epoch), int(number)) for p, folder, epoch, number in found]


def expected_samples(order: RunOrder, step: int) -> list[tuple[int, str, int, int]]:
    found = []
    for position in order.positions(step - 1):
        sample = order.locate(position)
        source = order.segments[sample.segment].sources[sample.source]
        found.append((position, source.path, sample.epoch, sample.number))
    return found


def test_a_step_of_a_new_mixture_names_every_sample_with_its_documents(
    made_once: MadeDataset, made_beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_config(tmp_path / "run", mixed(made_once.folder, made_beside))
    data = load_config(run / "config.yaml").config.data
    order = new_run(open_sources(data), data, global_batch_size=BATCH).order
    for asked in (run, run / "config.yaml"):
        printed = which(capsys, "--step", 3, "--config", asked)
        assert printed.startswith("step 3: samples 8 to 11 of the run\n")
        assert named_samples(printed) == expected_samples(order, 3)
    names = {folder for _, folder, _, _ in named_samples(printed)}
    assert names == {str(made_once.folder), str(made_beside)}
    for _, folder, _, number in named_samples(printed):
        alone = which(capsys, folder, "--sample-id", number, "--sequence-length", LENGTH)
        assert "doc_id" in alone
        assert alone in printed
    assert named_samples(which(capsys, "--samples", "8-11", "--config", run)) == named_samples(
        printed
    )


def test_the_newest_checkpoint_knows_what_was_changed_on_the_way(
    made_once: MadeDataset, made_beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = tmp_path / "beside"
    shutil.copytree(made_beside, beside)
    run = write_config(tmp_path / "run", mixed(made_once.folder, beside))
    config = load_config(run / "config.yaml").config
    both = source_records(open_sources(config.data), config.data)
    alone = [one for one in both if one.path == str(made_once.folder)]
    first = new_run(
        [s for s in open_sources(config.data) if str(s.dataset.path) == alone[0].path],
        config.data,
        global_batch_size=BATCH,
    ).order
    save_run(run, config, first, step=2)
    order = first.changed(step=3, sources=both, global_batch_size=2 * BATCH)
    save_run(run, config, order, step=5)
    for step in (1, 3, 4, 5, 9):
        printed = which(capsys, "--step", step, "--config", run)
        assert named_samples(printed) == expected_samples(order, step)
        assert len(named_samples(printed)) == (BATCH if step <= 3 else 2 * BATCH)
    assert str(beside) in printed

    moved = tmp_path / "moved"
    beside.rename(moved)
    assert str(beside) in which(capsys, "--step", 9, "--config", run, code=2)
    printed = which(capsys, moved, "--step", 9, "--config", run)
    assert [sample[2:] for sample in named_samples(printed)] == [
        sample[2:] for sample in expected_samples(order, 9)
    ]
    shutil.copytree(made_once.folder, beside)
    error = which(capsys, "--step", 9, "--config", run, code=2)
    assert f"{beside} holds another data set" in error


def test_a_checkpoint_older_than_mixtures_still_names_its_samples(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"dataset_path": str(made_once.folder), "sequence_length": LENGTH}
    run = write_config(tmp_path / "run", data, {"gradient_accumulation_steps": 2})
    message = which(capsys, "--step", 2, "--config", run, code=2)
    assert "has no checkpoint yet" in message
    config = load_config(run / "config.yaml").config
    order = new_run(open_sources(config.data), config.data, global_batch_size=6).order
    save_run(run, config, order, step=3, recorded=False)
    printed = which(capsys, "--step", 2, "--config", run)
    assert [(p, e, n) for p, _, e, n in named_samples(printed)] == [
        (p, e, n) for p, _, e, n in expected_samples(order, 2)
    ]


def test_samples_after_the_end_of_a_limited_mixture_are_refused(
    made_beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"sources": [{"path": str(made_beside), "max_epochs": 1}], "sequence_length": LENGTH}
    run = write_config(tmp_path / "run", data)
    assert "exhausted after" in which(capsys, "--samples", "100000", "--config", run, code=2)


def test_a_question_about_a_run_takes_its_own_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--step", "1"], ["--step", "1", "--config", "c", "--sequence-length", "9"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "own sequence length" in capsys.readouterr().err


def test_a_run_that_went_from_one_data_set_to_another_names_both(
    made_once: MadeDataset, made_beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_config(tmp_path / "run", mixed(made_once.folder, made_beside))
    config = load_config(run / "config.yaml").config
    sources = open_sources(config.data)
    records = source_records(sources, config.data)
    order = new_run(sources[:1], config.data, global_batch_size=BATCH).order
    order = order.changed(step=2, sources=records[1:], global_batch_size=BATCH)
    save_run(run, config, order, step=4)
    printed = which(capsys, "--samples", "6-9", "--config", run)
    assert named_samples(printed) == [
        *expected_samples(order, 2)[2:],
        *expected_samples(order, 3)[:2],
    ]
    assert len({folder for _, folder, _, _ in named_samples(printed)}) == 2


def test_what_no_checkpoint_records_is_said_to_be_what_would_come(
    made_once: MadeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"dataset_path": str(made_once.folder), "sequence_length": LENGTH}
    run = write_config(tmp_path / "run", data)
    config = load_config(run / "config.yaml").config
    save_run(
        run,
        config,
        new_run(open_sources(config.data), config.data, global_batch_size=4).order,
        step=3,
    )
    for words, noted in (
        (("--samples", "10-11"), False),
        (("--samples", "11-12"), True),
        (("--step", "3"), False),
        (("--step", "4"), True),
    ):
        assert main([*words, "--config", str(run), "--tokens", "0"]) == 0
        said = capsys.readouterr().err
        assert ("note: the newest checkpoint is of step 3" in said) == noted
