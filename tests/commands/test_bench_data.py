"""tools/bench.py data as a user starts it, and what it says of absent and wrong variants."""

import json
from pathlib import Path

import pytest
from processes import run_script

from mamba_dist.commands.bench import main
from mamba_dist.commands.bench.data_report import Runs, Turn, table

SCRIPT = "tools/bench.py"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        text = f"def function_{number}(x):\n    return {number} * x  # a café\n" * 40
        (folder / f"{number:02}.py").write_text(text, encoding="utf-8")
    return folder


def test_data_measures_ours_and_the_library_alone(corpus: Path, tmp_path: Path) -> None:
    chosen = ("--variants", "reference,raw-reference,megatron", "--rounds", "1")
    done = run_script(
        SCRIPT, "data", "--corpus", corpus, *chosen, "--json", "found.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "`tools/bench.py data --corpus " in done.stdout
    assert "| ours, tokenizers, end to end | 0.1 | 60 |" in done.stdout
    records = json.loads((tmp_path / "found.json").read_text())["records"]
    assert [r["variant"] for r in records] == ["reference", "raw-reference", "megatron"]
    assert len({r["turns"][0]["tokens"] for r in records}) == 1
    for record in records:
        [turn] = record["turns"]
        assert record["mb_per_cpu_s"]["median"] == pytest.approx(
            record["text_bytes"] / 1e6 / turn["cpu_s"]
        )


def test_ratios_are_taken_within_rounds_and_what_is_missing_is_said() -> None:
    runs = Runs({"fastokens": (20_000_000, 9), "megatron": (10_000_000, 5), "hf-map": (1, 1)})
    for ours_s, theirs_s in ((1.0, 10.0), (2.0, 20.0), (1.0, 5.0)):
        runs.add("fastokens", Turn(ours_s, 1.0, 500))
        runs.add("megatron", Turn(theirs_s, 1.0, 300))
    runs.add("hf-map", "No module named 'datasets'")
    text = table(runs)
    assert "| 20.00 (10.00 to 20.00) |" in text
    assert "| 20.0x (10.0x to 20.0x) |" in text
    assert "Hugging Face `datasets.map`: not measured: No module named 'datasets'" in text
    assert not runs.wrong


def test_another_number_of_ids_of_the_same_text_is_wrong() -> None:
    runs = Runs({"fastokens": (10, 1), "raw-fastokens": (10, 1)})
    runs.add("fastokens", Turn(1.0, 1.0, 5))
    runs.add("raw-fastokens", Turn(1.0, 1.0, 6))
    assert runs.wrong == {"raw-fastokens": "6 ids instead of 5"}
    assert "fastokens alone: wrong: 6 ids instead of 5" in table(runs)


def test_unknown_variants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "--variants", "tokie"])
    assert ended.value.code == 2
    assert "--variants: tokie unknown here" in capsys.readouterr().err
