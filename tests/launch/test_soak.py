"""The soak in a short form: three rounds of real launches, and the run that they must have been."""

import json
from pathlib import Path

import pytest

from mamba_dist.commands.soak import main

# Two ranks under ZeRO 3 are told to stop in a save; one under FSDP2, that finds the newest save cut
# short, is killed; under the next the disk fills up, and it goes on when there is room.
SEED = 52044


@pytest.mark.timeout(600)
def test_three_rounds_of_a_soak_are_one_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = tmp_path / "soak", tmp_path / "soak.json"
    words = ("--rounds", "3", "--seed", str(SEED), "--folder", str(folder), "--json", str(told))
    code = main(words)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "verdict    all held" in said
    record = json.loads(told.read_text())
    assert record["steps"] == 64
    assert record["steps_trained_again"] > 0
    assert record["resumes"] == 3
    assert record["passed_over"] == 1
    # Where no disk of its own may be mounted, the soak says so.
    events = record["events"] | record["events_not_done"]
    assert events == {"SIGUSR1 to a rank": 1, "kill all": 1, "full disk, then room": 1}
    assert ("NOT DONE" in said) == ("note: full disks are not done" in said)
    assert not folder.exists()


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").touch()
    assert main(["--rounds", "1", "--folder", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
