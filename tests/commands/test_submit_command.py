"""launch/submit.py: what it checks, writes and freezes; SLURM's commands are stand-ins.

With a real SLURM: tests/slurm/test_slurm_training.py.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from processes import ROOT
from tiny_run import write_config

from mamba_dist.commands import submit as command
from mamba_dist.commands.job_script import directives_of, limit_in_words, limit_seconds
from mamba_dist.commands.submission import changed_versions, code_digest, describe, freeze
from mamba_dist.commands.submit import TEMPLATE
from mamba_dist.config.load import load_config
from mamba_dist.errors import TrainingError

CPUS = ("--gpus-per-node", "0", "--ranks-per-node", "2")

FAKES = {
    # A job of the id 4711, unless it is only tried or refused.
    "sbatch": """#!/bin/bash
echo "$@" >> "$FAKE/sbatch"
env > "$FAKE/environment"
if [[ "$1" == --test-only && -e "$FAKE/refuse-trial" ]]
then echo "sbatch: error: invalid partition specified" >&2; exit 1
elif [[ "$1" == --test-only ]]; then echo "sbatch: Job 1 to start soon" >&2
elif [[ -e "$FAKE/refuse" ]]; then echo "sbatch: error: no such account" >&2; exit 1
else echo "4711"
fi
""",
    "squeue": '#!/bin/bash\ncat "$FAKE/queue"\n',
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for SLURM, and what they note."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "bin").mkdir()
    for name, text in FAKES.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.chdir(ROOT)
    return folder


def main(words: Sequence[str]) -> int:
    return command.main(words, environment=os.environ)


def submissions(run_dir: Path) -> list[str]:
    """All that they leave, but for the file that only locks."""
    folder = run_dir / "submissions"
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return [name for name in found if name != ".lock"]


def test_a_job_is_frozen_with_all_it_needs(
    cluster: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "my job", tiny_data)
    run_dir = tmp_path / "my job/run"
    words = ("--config", str(config), *CPUS, "--time", "08:00:00", "--account", "science")
    assert main([*words, "--requeue", "training.learning_rate=0.002"]) == 0
    told = capsys.readouterr()
    assert told.out == "4711\n"
    assert "2 ranks" in told.err
    assert "limit 8 h for each start" in told.err
    kept = run_dir / "submissions/0001"
    assert (cluster / "sbatch").read_text().splitlines()[-1] == f"--parsable {kept}/train.sbatch"
    assert yaml.safe_load((kept / "config.yaml").read_text())["training"]["learning_rate"] == 0.002
    account = json.loads((kept / "submit.json").read_text())
    assert (account["job"], account["ranks"]) == ("4711", 2)
    assert account["command"][-1] == "training.learning_rate=0.002"
    # All that a rank runs, as it is here, and nothing beside it.
    assert account["code_sha256"] == code_digest(ROOT) == code_digest(kept / "code")
    assert not list(kept.rglob("__pycache__"))
    script = (kept / "train.sbatch").read_text()
    given = directives_of(script)
    assert (given["nodes"], given["ntasks-per-node"], given["account"]) == ("1", "2", "science")
    assert given["output"] == f'"{kept}/slurm-%j.log"'
    assert "gpus-per-node" not in given
    assert "requeue" in given
    assert f"set -- --config '{kept}/config.yaml'" in script
    subprocess.run(["bash", "-n", kept / "train.sbatch"], check=True)
    # A job of the run that waits or runs.
    (cluster / "queue").write_text(f"12 /a/script\n4711 {kept}/train.sbatch\n")
    assert main([*words]) == 2
    assert "job 4711 of" in capsys.readouterr().err
    # One that was submitted by hand, or by a submit.py that was killed.
    (cluster / "queue").write_text(f"12 /a/script\n4712 {kept}/train.sbatch --words\n")
    assert main([*words]) == 2
    assert "job 4712 of" in capsys.readouterr().err
    (cluster / "queue").write_text(f"4711 {kept}/train.sbatch\n")
    assert main([*words, "--sbatch-option=--dependency=afterany:4711"]) == 0
    second = directives_of((run_dir / "submissions/0002/train.sbatch").read_text())
    assert second["dependency"] == "afterany:4711"
    assert "no-requeue" in second
    assert "requeue" not in second


def test_all_mistakes_are_told_at_once_and_leave_nothing(
    cluster: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_data, data={"dataset_path": str(tmp_path / "absent")})
    asked = ("--nodes", "3", "--gpus-per-node", "8", "--ranks-per-node", "2", "--time", "4")
    further = [
        f"--sbatch-option={word}"
        for word in ("--time=99", "exclusive", "--array=0-3", "--wait", "--outpu=x")
    ]
    (cluster / "refuse-trial").touch()
    assert main(["--config", str(config), *asked, *further]) == 2
    error = capsys.readouterr().err
    for part in (
        "10 problems",
        "24 ranks cannot share evenly",
        "--ranks-per-node 2 with --gpus-per-node 8",
        "--time 4 is 4 min",
        "instead of --time give --time to launch/submit.py itself",
        "'exclusive' is no option of sbatch",
        "cannot have --array",
        "cannot have --wait",
        "the log stays in the run folder, without --output",
        str(tmp_path / "absent"),
        # Of SLURM, which is asked all the same.
        "invalid partition specified",
    ):
        assert part in error
    assert (cluster / "sbatch").read_text().startswith("--test-only")
    assert len((cluster / "sbatch").read_text().splitlines()) == 1
    assert submissions(tmp_path / "run") == []


def test_a_batch_that_cannot_be_shared_names_the_numbers_that_can(
    cluster: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_data)
    assert main(["--config", str(config), "--nodes", "3", *CPUS, "--time", "60"]) == 2
    assert "6 ranks cannot share evenly; numbers of ranks that can: 1, 2, 4" in (
        capsys.readouterr().err
    )


def test_of_two_submissions_at_once_one_is_refused(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--config", str(write_config(tmp_path, tiny_data)), *CPUS, "--time", "60")
    asked: list[int] = []

    def and_meanwhile(
        jobs: Sequence[str], *, scripts_in: Path, environment: Mapping[str, str]
    ) -> list[str]:
        """While the first one makes its checks, another begins and ends."""
        asked.append(1)
        if len(asked) == 1:
            assert main([*words]) == 0
        return []

    monkeypatch.setattr("mamba_dist.commands.submit.waiting_or_running", and_meanwhile)
    assert main([*words]) == 2
    assert "another submission of this run was made at the same time" in capsys.readouterr().err
    assert submissions(tmp_path / "run") == ["0001"]


def test_a_submission_that_meets_another_within_sbatch_is_refused(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--config", str(write_config(tmp_path, tiny_data)), *CPUS, "--time", "60")

    def and_meanwhile(script: Path, *, environment: Mapping[str, str]) -> str:
        """SLURM knows nothing of this job yet."""
        assert main([*words]) == 2
        return "4711"

    monkeypatch.setattr("mamba_dist.commands.submit.submit", and_meanwhile)
    assert main([*words]) == 0
    assert "another submission of" in capsys.readouterr().err
    assert submissions(tmp_path / "run") == ["0001"]


def test_a_submission_that_was_checked_before_another_came_into_the_queue_is_refused(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--config", str(write_config(tmp_path, tiny_data)), *CPUS, "--time", "60")
    answers: list[list[str]] = [[], ["4710"]]
    monkeypatch.setattr(
        "mamba_dist.commands.submit.waiting_or_running", lambda *_, **__: answers.pop(0)
    )
    assert main([*words]) == 2
    assert "job 4710 of" in capsys.readouterr().err
    assert submissions(tmp_path / "run") == []


def test_what_a_killed_submission_left_goes_after_a_day(
    cluster: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run/submissions"
    for name in (".0001.12.partial", ".0001.13.partial"):
        (folder / name / "code").mkdir(parents=True)
    then = time.time() - 2 * 86400
    os.utime(folder / ".0001.12.partial", (then, then))
    words = ("--config", str(write_config(tmp_path, tiny_data)), *CPUS, "--time", "60")
    assert main([*words]) == 0
    assert submissions(tmp_path / "run") == [".0001.13.partial", "0001"]


def test_code_that_is_not_the_code_that_checks_is_refused(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, other = write_config(tmp_path, tiny_data), tmp_path / "other checkout"
    (other / TEMPLATE.parent).mkdir(parents=True)
    (other / TEMPLATE).write_text((ROOT / TEMPLATE).read_text())
    monkeypatch.chdir(other)
    assert main(["--config", str(config), *CPUS, "--time", "60"]) == 2
    told = capsys.readouterr().err
    assert f"the code of {other} would be frozen, but it is the mamba_dist of {ROOT}" in told
    assert "PYTHONPATH=. python launch/submit.py" in told
    assert submissions(tmp_path / "run") == []


def test_a_commit_that_git_does_not_tell_is_a_warning_in_its_words(
    cluster: Path, tmp_path: Path
) -> None:
    (cluster / "bin/git").write_text(
        "#!/bin/bash\nprintf 'fatal: dubious ownership\\n\\tgit config --add\\n' >&2; exit 128\n"
    )
    (cluster / "bin/git").chmod(0o755)
    warnings: list[str] = []
    # Outside of git there is none to tell.
    assert describe(tmp_path, command=[], ranks=1, warn=warnings.append).commit is None
    assert not warnings
    (tmp_path / ".git").mkdir()
    assert describe(tmp_path, command=[], ranks=1, warn=warnings.append).commit is None
    [warning] = warnings
    assert warning.endswith("fatal: dubious ownership git config --add")


def test_settings_of_the_submitting_shell_do_not_undo_what_is_submitted(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SBATCH_NO_REQUEUE", "SBATCH_TIMELIMIT", "SLURM_MEM_PER_CPU", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "science")
    monkeypatch.setenv("SLURM_CONF", "/a/slurm.conf")
    words = ("--config", str(write_config(tmp_path, tiny_data)), *CPUS, "--time", "60")
    assert main([*words, "--partition", "gpu"]) == 0
    assert "warning: SBATCH_NO_REQUEUE, SBATCH_TIMELIMIT ignored" in capsys.readouterr().err
    lines = (cluster / "environment").read_text().splitlines()
    # Of the partition the option holds, as with sbatch itself.
    assert {x for x in lines if x.startswith(("SBATCH_", "SLURM_"))} == {
        "SBATCH_ACCOUNT=science",
        "SLURM_CONF=/a/slurm.conf",
    }
    # The job gets the rest.
    assert f"FAKE={cluster}" in lines


def test_options_take_the_place_of_what_they_exclude(
    cluster: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(write_config(tmp_path, tiny_data)), "--time", "8:00", "--dry-run"]
    words += ["--stop-before", "60", "--gpus-per-node", "a100:4"]
    options = ["--sbatch-option=--mem-per-c=4G", "--sbatch-option=--cpus-per-gpu=6"]
    assert main([*words, *options]) == 0
    shown = capsys.readouterr().out
    given = directives_of(shown)
    assert (given["mem-per-cpu"], given["cpus-per-gpu"]) == ("4G", "6")
    assert not {"mem", "cpus-per-task"} & given.keys()
    assert (given["gpus-per-node"], given["ntasks-per-node"]) == ("a100:4", "4")
    # Not hours.
    assert "\n8 min for each start\n" in shown
    for wrong in ("a100:0", "a100", "gpu:a100:4", "-1", "a100:2,h100:2"):
        with pytest.raises(SystemExit):
            main([*words, f"--gpus-per-node={wrong}"])
        assert "give N or TYPE:N" in capsys.readouterr().err


def test_code_that_cannot_be_copied_is_named(tiny_data: Path, tmp_path: Path) -> None:
    for name in ("mamba_dist", "launch"):
        (tmp_path / name).mkdir()
    (tmp_path / "launch/gone.py").symlink_to(tmp_path / "nowhere")
    config = load_config(write_config(tmp_path, tiny_data)).config
    kept, submission = tmp_path / "kept", describe(tmp_path, command=[], ranks=1, warn=print)
    with pytest.raises(TrainingError, match=r"gone\.py"):
        freeze(kept, submission, config=config, script="", repository=tmp_path)
    assert not list(tmp_path.glob("*kept*"))


@pytest.mark.parametrize("name", ["at 12:30", "back\\slash", "two\nlines"])
def test_a_folder_that_python_or_slurm_would_misread_is_refused(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    config = write_config(tmp_path, tiny_data, training={"run_dir": str(tmp_path / name)})
    assert main(["--config", str(config), *CPUS, "--time", "60"]) == 2
    assert "would misread the path" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_what_slurm_refuses_leaves_nothing(
    cluster: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_data)
    (cluster / "refuse").touch()
    assert main(["--config", str(config), *CPUS, "--time", "60"]) == 2
    assert "no such account" in capsys.readouterr().err
    assert submissions(tmp_path / "run") == []


def test_a_dry_run_shows_plan_and_script_and_needs_no_slurm(
    cluster: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(tmp_path, tiny_data)
    words = ["--config", str(config), "--gpus-per-node", "4", "--time", "1-0"]
    monkeypatch.setattr("mamba_dist.commands.scheduler.shutil.which", lambda name: None)
    assert main(words) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 ranks" in shown
    assert directives_of(shown)["gpus-per-node"] == "4"
    # The default of --stop-before is what the script says by itself.
    assert directives_of(shown)["signal"] == directives_of(TEMPLATE.read_text())["signal"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("02:00:10", 7210),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-01:01:01", 90061),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_time_limits_are_told_with_their_units() -> None:
    assert limit_in_words(480) == "8 min"
    assert limit_in_words(2 * 86400 + 12 * 3600 + 5) == "2 d 12 h 5 s"
    assert limit_in_words(None) == "no limit"


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "2-", "1.5"])
def test_other_texts_are_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError, match="no time limit"):
        limit_seconds(text)


def test_packages_that_changed_since_the_submission_are_named(tmp_path: Path) -> None:
    assert changed_versions(tmp_path) == []
    (tmp_path / "submit.json").write_text(json.dumps({"versions": {"torch": "1.0", "gone": "2"}}))
    lines = changed_versions(tmp_path)
    assert any(line.startswith("torch is ") and "it was 1.0" in line for line in lines)
    assert "gone is not installed, at submission it was 2" in lines
