import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.manifest import BuildSettings
from mamba_dist.data.preparation.sources import DiscoveryOptions, InputFile, discover
from mamba_dist.data.preparation.staging import BuildPlan, check_same_build, open_staging
from mamba_dist.errors import DataError


def plan_of(tmp_path: Path, *, formats: str = "", renamed: bool = False) -> BuildPlan:
    settings = BuildSettings("0" * 64, None, "text", 0.9, 0.1, 1, 1)
    names = ["a/x.txt", "a/x.txt"] if renamed else ["a/x.txt", "b.txt"]
    kind: Any = formats or "text"
    files = [InputFile(f"{n}", name, 5 + n, 9, kind, "none") for n, name in enumerate(names)]
    return BuildPlan(settings, 1, tuple(files))


def test_the_same_files_read_as_another_format_are_another_plan(tmp_path: Path) -> None:
    open_staging(tmp_path, plan_of(tmp_path), overwrite=False)
    with pytest.raises(DataError, match=r"2 input files read in another format: a/x.txt, b.txt"):
        open_staging(tmp_path, plan_of(tmp_path, formats="jsonl"), overwrite=False)
    [plan] = tmp_path.glob(".partial-*/plan.json")
    content = json.loads(plan.read_bytes())
    content["inputs"] = [entry[:3] for entry in content["inputs"]]  # as an earlier version wrote it
    plan.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"\(by another version of this program\)"):
        open_staging(tmp_path, plan_of(tmp_path, formats="jsonl"), overwrite=False)


def test_a_changed_file_is_told_from_another_of_its_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, renamed=True)
    open_staging(tmp_path, plan, overwrite=False)
    first, second = plan.files
    changed = replace(plan, files=(replace(first, bytes=99), second))
    with pytest.raises(DataError, match=r"\(1 input files changed: a/x.txt\)"):
        open_staging(tmp_path, changed, overwrite=False)


def test_a_finished_data_set_read_as_another_format_is_no_match_unless_the_format_is_not_recorded(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "set"))
    manifest = open_dataset(output).manifest
    files = discover([corpus_path], DiscoveryOptions()).files
    other = tuple(replace(file, format="jsonl") for file in files)
    plan = BuildPlan(manifest.settings, 4000, other)
    with pytest.raises(DataError, match="60 input files read in another format"):
        check_same_build(output, manifest, plan=plan)
    lines = [json.loads(line) for line in (output / "inputs.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k not in ("format", "compression")} for line in lines]
    content = "".join(json.dumps(line) + "\n" for line in old).encode()
    (output / "inputs.jsonl").write_bytes(content)
    inputs = replace(manifest.inputs, sha256=hashlib.sha256(content).hexdigest())
    check_same_build(output, replace(manifest, inputs=inputs), plan=plan)
