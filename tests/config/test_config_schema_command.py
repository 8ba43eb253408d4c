"""tools/config_schema.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_dist.commands.config_schema import main
from mamba_dist.config import RunConfig

TOOLS = Path(__file__).parents[2] / "tools"


def test_the_schema_is_printed_with_ranges_and_the_meaning_of_every_field() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / "config_schema.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    schema = json.loads(done.stdout)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == list(RunConfig.model_fields)
    d_model = schema["$defs"]["MambaConfig"]["properties"]["d_model"]
    assert (d_model["minimum"], d_model["maximum"]) == (8, 65536)
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field["description"], name


def test_the_schema_is_written_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "schema.json"
    assert main(["--output", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    written = path.read_text()
    assert main([]) == 0
    assert capsys.readouterr().out == written


def test_a_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "none" / "schema.json")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none/schema.json cannot be")
