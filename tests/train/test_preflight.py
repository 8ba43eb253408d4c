"""What stands in the way of a start is told all at once, each once, with the hosts that have it."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from written_checkpoint import OneRank

from mamba_dist.config.schema import RunConfig
from mamba_dist.errors import ShortageError, StartError
from mamba_dist.train import preflight
from mamba_dist.train.preflight import (
    Findings,
    prepare_and_check,
    problems_of,
    unsupported,
    warnings_of,
)
from mamba_dist.train.run_folder import HeldFolder


def four_ranks(**facts: str) -> list[Findings]:
    return [Findings(rank, f"node{rank // 2}", 1000.0, facts) for rank in range(4)]


def test_ranks_that_are_alike_have_no_problem() -> None:
    told = four_ranks(torch="2.13.0")
    assert problems_of(told) == []
    assert warnings_of(told) == []


def test_each_problem_is_told_once_with_the_ranks_that_have_it() -> None:
    told = four_ranks(torch="2.13.0")
    told[2] = replace(told[2], facts={"torch": "2.11.0"}, problems=["no data", "no room"])
    told[3] = replace(told[3], problems=["no data"])
    assert problems_of(told) == [
        "torch differs: 2.13.0 on node0, node1 (ranks 0-1, 3); 2.11.0 on node1 (rank 2); use one "
        "environment on all nodes",
        "node1 (ranks 2-3): no data",
        "node1 (rank 2): no room",
    ]


def test_a_problem_of_all_ranks_names_none() -> None:
    assert problems_of([replace(one, problems=["no data"]) for one in four_ranks()]) == ["no data"]


def test_a_thousand_ranks_are_told_in_one_line() -> None:
    told = [Findings(rank, f"node{rank // 8:03d}", 0.0, {}) for rank in range(1000)]
    told[8:] = [replace(one, problems=["no data"]) for one in told[8:]]
    [line] = problems_of(told)
    assert line.endswith("node008 and 116 more (ranks 8-999): no data")


def test_what_only_some_ranks_tell_is_compared_among_them() -> None:
    told = four_ranks()
    told[0] = replace(told[0], facts={"the code of mamba-dist": "abc"})
    told[2] = replace(told[2], facts={"the code of mamba-dist": "def"})
    assert problems_of(told)[0].startswith(
        "the code of mamba-dist differs: abc on node0 (rank 0); def on node1 (rank 2); "
    )


def test_other_gpus_and_other_clocks_are_warnings() -> None:
    told = four_ranks(**{"the GPU": "A"})
    told[3] = replace(told[3], facts={"the GPU": "B"}, clock_s=1005.5)
    told[1] = replace(told[1], clock_s=1004.0)
    assert problems_of(told) == []
    gpus, clocks = warnings_of(told)
    assert gpus.endswith(
        "A on node0, node1 (ranks 0-2); B on node1 (rank 3); all wait for the slowest at every step"
    )
    assert clocks.startswith("the clock of node1 is 6 s ahead of that of node0: ")
    assert warnings_of(told[:3])[0:1] == []


@pytest.mark.parametrize(
    ("capability", "built_for", "works"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((7, 0), ["sm_80", "sm_90", "compute_90"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_an_objection(
    capability: tuple[int, int], built_for: list[str], works: bool
) -> None:
    objections = unsupported("a GPU", capability, built_for)
    assert bool(objections) != works
    assert all("install another build of torch" in line for line in objections)


class Others(OneRank):
    """Rank 0 of two; the other one tells what this one does, changed."""

    size = 2
    local_rank = 0
    local_size = 1
    device = torch.device("cpu")

    def __init__(self, **changes: object) -> None:
        self._changes = changes

    def barrier(self) -> None:
        pass

    def on_this_host(self) -> list[int]:
        return [0]

    def texts_of_all_ranks(self, text: str) -> list[str]:
        return [text, json.dumps({**json.loads(text), "rank": 1, "host": "b", **self._changes})]


def config(run_dir: Path, **engine: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"d_model": 16, "n_layers": 1, "vocab_size": 320},
            "training": {
                "run_dir": str(run_dir),
                "global_batch_size": 64,
                "max_steps": 9,
                "warmup_steps": 1,
            },
            "data": {"dataset_path": str(run_dir / "nowhere")},
            "engine": {"ops_backend": "torch", **engine},
        }
    )


def taken(run_dir: Path) -> HeldFolder:
    folder = HeldFolder(run_dir, OneRank())
    folder.take()
    return folder


def test_all_problems_of_a_start_come_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = logging.getLogger("mamba_dist")
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(preflight, "disk_objections", lambda *_, **__: (["no room"], ["little"]))
    folder = taken(tmp_path)
    with pytest.raises(StartError) as raised:
        prepare_and_check(
            config(tmp_path, ops_backend="gpu"), folder, world=Others(problems=["no data there"])
        )
    folder.release()
    head, *lines = str(raised.value).splitlines()
    assert head == "4 problems at the start of the run:"
    assert "(rank 0): " in lines[0]
    assert f"{tmp_path / 'nowhere'}" in lines[0]
    assert "ops backend 'gpu' needs device type 'cuda'" in lines[1]
    assert lines[2].endswith("(rank 0): no room")
    assert lines[3] == "  4. b (rank 1): no data there"
    assert "little" in caplog.text


def test_an_error_of_the_batch_hides_none_of_the_data_sets(tmp_path: Path) -> None:
    folder = taken(tmp_path)
    told = config(tmp_path)
    sources = [{"path": str(tmp_path / name), "weight": 1} for name in ("one", "other")]
    asked = {
        **told.model_dump(),
        "data": {"sources": sources},
        "training": {**told.training.model_dump(), "micro_batch_size": 64},
    }
    with pytest.raises(StartError) as raised:
        prepare_and_check(RunConfig.model_validate(asked), folder, world=Others())
    folder.release()
    head, *lines = str(raised.value).splitlines()
    assert head == "3 problems at the start of the run:"
    assert "cannot share evenly" in lines[0]
    assert str(tmp_path / "one") in lines[1]
    assert str(tmp_path / "other") in lines[2]


def test_a_link_to_nowhere_beside_the_code_ends_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Emacs makes one for a file with changes."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/preflight.py").touch()
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "train/preflight.py"))
    before = preflight._code_digest()
    (tmp_path / "train/.#preflight.py").symlink_to("user@host.4711")
    assert preflight._code_digest() == before
    (tmp_path / "train/preflight.py").rename(tmp_path / "preflight.py")
    assert preflight._code_digest() != before


def test_what_may_be_gone_later_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = taken(tmp_path)
    monkeypatch.setattr(preflight, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(preflight, "_described", lambda _: "data")
    monkeypatch.setattr(preflight, "memory_objections", lambda *_, **__: ([], ["little is free"]))
    monkeypatch.setattr(preflight, "disk_objections", lambda *_, **__: ([], []))
    with pytest.raises(ShortageError) as raised:
        prepare_and_check(config(tmp_path), folder, world=Others(shortages=()))
    assert raised.value.exit_code == 75
    assert str(raised.value).endswith("(rank 0): little is free")
    with pytest.raises(StartError, match="2 problems") as raised:
        prepare_and_check(config(tmp_path), folder, world=Others(shortages=(), problems=["other"]))
    assert raised.value.exit_code == 2
    folder.release()


def test_a_rank_that_cannot_look_ends_all_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = taken(tmp_path)
    with pytest.raises(RuntimeError, match=r"^b \(rank 1\) crashed at the start: OSError: stale$"):
        prepare_and_check(config(tmp_path), folder, world=Others(crash="OSError: stale"))
    told: list[str] = []

    def note(self: Others, text: str) -> list[str]:
        told.append(json.loads(text)["crash"])
        return [text]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not for you")

    monkeypatch.setattr(Others, "texts_of_all_ranks", note)
    monkeypatch.setattr(preflight, "prepare", refuse)
    with pytest.raises(PermissionError):
        prepare_and_check(config(tmp_path), folder, world=Others())
    folder.release()
    assert told == ["PermissionError: not for you"]


def test_a_single_problem_is_told_as_it_is(tmp_path: Path) -> None:
    folder = taken(tmp_path)
    with pytest.raises(StartError, match=rf"^{tmp_path}/nowhere"):
        prepare_and_check(config(tmp_path), folder, world=Others())
    folder.release()


def test_what_a_rank_tells_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand ranks receive what a thousand tell."""
    told: list[str] = []
    monkeypatch.setattr(
        Others, "texts_of_all_ranks", lambda self, text: told.append(text) or [text]
    )
    folder = taken(tmp_path)
    with pytest.raises(StartError):
        prepare_and_check(config(tmp_path), folder, world=Others())
    folder.release()
    assert len(told[0]) < 1500
    facts = json.loads(told[0])["facts"]
    assert facts.keys() >= {"the config", "Python", "torch", "deepspeed", "mamba-dist"}
    assert facts.keys() >= {"the code of mamba-dist", "the ops backend"}
    assert asdict(Findings(**json.loads(told[0])))["facts"] == facts
