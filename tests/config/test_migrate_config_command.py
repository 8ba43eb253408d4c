"""tools/migrate_config.py as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from mamba_dist.commands.migrate_config import main
from mamba_dist.config import ConfigLoader, create_default_config
from mamba_dist.config.text import read_document

TOOLS = Path(__file__).parents[2] / "tools"

OLD = "training:\n  batch_size: 6\n  learning_rate: 3e-4\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    return path


@pytest.mark.parametrize("name", ["new.yaml", "new.json"])
def test_an_old_file_is_rewritten_with_an_account(
    old: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new = old.with_name(name)
    assert main([str(old), "--output", str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{old}: schema version 1 -> 2:"
    assert "  training.batch_size 6 is now training.micro_batch_size 6" in lines
    assert lines[-1] == f"wrote {new}"
    assert read_document(new)["schema_version"] == 2
    assert ConfigLoader.load_from_file(new) == ConfigLoader.load_from_file(old)
    assert old.read_text() == OLD


def test_an_existing_file_is_replaced_only_by_force(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = old.with_name("new.yaml")
    new.write_text("mine")
    assert main([str(old), "--output", str(new)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: {new} exists; give another --output, or --force to replace it\n"
    )
    assert new.read_text() == "mine"
    assert main([str(old), "--output", str(new), "--force"]) == 0
    assert ConfigLoader.load_from_file(new).training.micro_batch_size == 6


def test_a_bad_file_is_refused_and_nothing_is_written(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old.write_text("training:\n  batch_size: 0\n")
    new = old.with_name("new.yaml")
    assert main([str(old), "--output", str(new)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {old}: training.batch_size: found 0")
    assert not new.exists()


def test_a_current_file_is_written_and_said_to_be_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current, new = tmp_path / "a.yaml", tmp_path / "b.json"
    ConfigLoader.save_to_file(create_default_config(), current)
    assert main([str(current), "--output", str(new)]) == 0
    assert capsys.readouterr().out == (f"{current}: is of schema version 2 already\nwrote {new}\n")
    assert ConfigLoader.load_from_file(new) == create_default_config()


def test_the_script_runs_and_passes_its_exit_code_on(old: Path) -> None:
    new = old.with_name("new.toml")
    command = [sys.executable, str(TOOLS / "migrate_config.py"), str(old), "--output", str(new)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {new} has suffix '.toml'; a config is a .yaml, .yml or .json file\n"
    )
