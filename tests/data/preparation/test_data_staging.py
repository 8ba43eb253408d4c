import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_data import SilentListener, build, folder_bytes, made_texts

from mamba_dist.data.dataset import open_dataset
from mamba_dist.data.planning import make_plan
from mamba_dist.data.preparation.share import Share
from mamba_dist.data.preparation.sources import DiscoveryOptions, cut_units, discover
from mamba_dist.data.preparation.staging import Staging
from mamba_dist.data.tokenization import train_bpe
from mamba_dist.errors import DataError

BUILDER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from made_data import SilentListener, build

class Loud(SilentListener):
    def advanced(self, unit, record):
        print(unit.index, flush=True)
        sys.stdin.readline()

if __name__ == "__main__":
    corpus, output, tokenizer = map(Path, sys.argv[1:4])
    options = {{"workers": int(sys.argv[4]), "unit_bytes": 900}}
    build(corpus, output, tokenizer, listener=Loud(), **options)
"""


def start_builder(
    tmp_path: Path, corpus: Path, output: Path, tokenizer: Path, *, workers: int
) -> "subprocess.Popen[str]":
    """A build in a process of its own that stops after each unit until it is told to go on."""
    script = tmp_path / "builder.py"
    script.write_text(BUILDER.format(tests=str(Path(__file__).parents[1])))
    return subprocess.Popen(
        [sys.executable, str(script), str(corpus), str(output), str(tokenizer), str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def go_on(builder: "subprocess.Popen[str]", units: int) -> None:
    assert builder.stdout is not None
    assert builder.stdin is not None
    for unit in range(units):
        if unit:
            builder.stdin.write("\n")
            builder.stdin.flush()
        assert builder.stdout.readline().strip().isdigit()


def total_units(corpus: Path) -> int:
    return len(cut_units(discover([corpus], DiscoveryOptions()).files, unit_bytes=900))


@pytest.mark.parametrize("units", [1, 6])
@pytest.mark.parametrize("with_workers", [True, False])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    finished: Path,
    corpus_path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    units: int,
    with_workers: bool,
) -> None:
    output = tmp_path / "set"
    builder = start_builder(tmp_path, corpus_path, output, tokenizer_path, workers=2)
    go_on(builder, units)
    if with_workers:
        os.killpg(builder.pid, signal.SIGKILL)
    else:
        builder.kill()
    builder.communicate()
    with pytest.raises(DataError, match=r"holds no manifest.json"):
        open_dataset(output)
    listener = SilentListener()
    build(corpus_path, output, tokenizer_path, listener=listener, unit_bytes=900)
    assert listener.done_bytes > 0
    assert listener.units <= total_units(corpus_path) - units
    assert folder_bytes(output) == folder_bytes(finished)


def test_a_torn_journal_line_and_a_lost_part_are_made_again(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    builder = start_builder(tmp_path, corpus_path, output, tokenizer_path, workers=1)
    go_on(builder, 5)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    [staging] = output.glob(".partial-*")
    journal = staging / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    min((staging / "parts").glob("*.part")).unlink()
    # Killed once more, after lines were added behind the torn one.
    builder = start_builder(tmp_path, corpus_path, output, tokenizer_path, workers=1)
    go_on(builder, 3)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    listener = SilentListener()
    build(corpus_path, output, tokenizer_path, listener=listener, unit_bytes=900)
    assert listener.units == total_units(corpus_path) - (5 - 2) - 3
    assert folder_bytes(output) == folder_bytes(finished)


@pytest.mark.parametrize("step", ["publish", "write_manifest"])
def test_a_crash_at_the_very_end_leaves_no_data_set_and_is_mended(
    finished: Path,
    corpus_path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    class PowerCut(BaseException):
        pass

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(f"mamba_dist.data.preparation.build.{step}", cut)
        with pytest.raises(PowerCut):
            build(corpus_path, tmp_path, tokenizer_path)
    with pytest.raises(DataError, match="holds no manifest"):
        open_dataset(tmp_path)
    listener = SilentListener()
    build(corpus_path, tmp_path, tokenizer_path, listener=listener)
    assert listener.units == 0
    assert folder_bytes(tmp_path) == folder_bytes(finished)


def test_a_second_build_into_the_same_folder_is_refused(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    builder = start_builder(tmp_path, corpus_path, output, tokenizer_path, workers=1)
    try:
        go_on(builder, 1)
        with pytest.raises(DataError, match="another process is writing into"):
            build(corpus_path, output, tokenizer_path)
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.communicate()


def test_the_lock_goes_away_with_its_holder(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / ".lock").write_text("")  # as a killed process leaves it
    build(corpus_path, tmp_path, tokenizer_path)
    assert not (tmp_path / ".lock").exists()
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            build(corpus_path, tmp_path, tokenizer_path)


def copy_of(finished: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in folder_bytes(finished).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_finished_build_has_nothing_to_do(
    finished: Path, corpus_path: Path, tokenizer_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    result = build(corpus_path, finished, tokenizer_path, workers=4, max_bad=0, batch_documents=7)
    assert result.was_complete
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text_field": "body"}, "text_field was 'text', is 'body'"),
        ({"train_split": 0.7, "val_split": 0.3}, "train_split was 0.8, is 0.7"),
        ({"batch_tokens": 99}, "batch_tokens was 500, is 99"),
        ({"eos_token": "!"}, "eos_token was None, is '!'"),
        ({"exclude": ("b",)}, "30 input files removed: corpus/b/01.txt, corpus/b/03.txt"),
    ],
)
def test_a_finished_build_with_other_settings_is_refused_with_the_difference(
    finished: Path, corpus_path: Path, tokenizer_path: Path, options: dict[str, object], said: str
) -> None:
    before = folder_bytes(finished)
    with pytest.raises(DataError) as caught:
        build(corpus_path, finished, tokenizer_path, **options)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert folder_bytes(finished) == before


def test_another_tokenizer_into_a_finished_folder_is_refused(
    finished: Path, corpus_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(train_bpe(made_texts(20), vocab_size=300))
    with pytest.raises(DataError, match="tokenizer was "):
        build(corpus_path, finished, other)


def test_a_changed_input_of_equal_size_is_noticed(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    corpus = copy_of(corpus_path / "a", tmp_path / "corpus")
    build(corpus, tmp_path / "set", tokenizer_path)
    path = corpus / "04.txt"
    path.write_bytes(path.read_bytes().replace(b"the", b"THE").replace(b"text", b"TEXT"))
    with pytest.raises(DataError, match=r"1 input files changed: corpus/04\.txt"):
        build(corpus, tmp_path / "set", tokenizer_path)
    (corpus / "new.txt").write_text("a new file")
    with pytest.raises(DataError, match=r"1 input files added: corpus/new\.txt"):
        build(corpus, tmp_path / "set", tokenizer_path)


def test_an_unfinished_build_with_other_settings_is_refused_and_can_be_dropped(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    builder = start_builder(tmp_path, corpus_path, output, tokenizer_path, workers=1)
    go_on(builder, 2)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    with pytest.raises(DataError, match=r"unfinished data set .*batch_tokens was 500, is 99"):
        build(corpus_path, output, tokenizer_path, batch_tokens=99, unit_bytes=900)
    build(corpus_path, output, tokenizer_path, batch_tokens=99, overwrite=True)
    assert not list(output.glob(".partial-*"))


def test_overwriting_replaces_a_finished_data_set(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    old = build(corpus_path / "a", output, tokenizer_path, batch_tokens=50, shard_bytes=200)
    make_plan(output, old.manifest, packing="pad", length=64, advance=lambda tokens: None)
    build(corpus_path, output, tokenizer_path, overwrite=True)
    assert folder_bytes(output) == folder_bytes(finished)


def test_a_truncated_shard_of_a_finished_build_is_not_called_complete(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    output = copy_of(finished, tmp_path / "set")
    shard = output / "train-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train-00000.arrow is truncated"):
        build(corpus_path, output, tokenizer_path)
    build(corpus_path, output, tokenizer_path, overwrite=True)
    assert folder_bytes(output) == folder_bytes(finished)


def interrupt(tmp_path: Path, corpus: Path, tokenizer: Path, *, units: int) -> Path:
    """The unfinished data set of a killed build; the folder of its parts."""
    builder = start_builder(tmp_path, corpus, tmp_path / "set", tokenizer, workers=1)
    go_on(builder, units)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.communicate()
    [parts] = (tmp_path / "set").glob(".partial-*/parts")
    return parts


class AtStart(SilentListener):
    """What lies half-written when the work begins."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self._output = output
        self.leftovers: list[str] = []

    def started(self, *, total_bytes: int, done_bytes: int) -> None:
        super().started(total_bytes=total_bytes, done_bytes=done_bytes)
        self.leftovers += [path.name for path in self._output.glob(".partial-*/parts/.unit*")]


def test_overwriting_starts_an_unfinished_build_of_the_same_plan_over(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path, corpus_path, tokenizer_path, units=3)
    listener = SilentListener()
    options = {"unit_bytes": 900, "overwrite": True}
    build(corpus_path, tmp_path / "set", tokenizer_path, listener=listener, **options)
    assert (listener.done_bytes, listener.units) == (0, total_units(corpus_path))
    assert folder_bytes(tmp_path / "set") == folder_bytes(finished)


def test_a_damaged_part_is_made_again_and_what_a_kill_left_is_gone(
    finished: Path, corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    parts = interrupt(tmp_path, corpus_path, tokenizer_path, units=3)
    (parts / ".unit-00000004.part.0123456789abcdef.partial").write_text("cut sh")
    part = min(parts.glob("*.part"))
    part.write_bytes(bytes(part.stat().st_size))
    listener = AtStart(tmp_path / "set")
    build(corpus_path, tmp_path / "set", tokenizer_path, listener=listener, unit_bytes=900)
    [notice] = [notice for notice in listener.notices if "changed since" in notice]
    assert notice.endswith("it is made again")
    assert part.name in notice
    assert listener.leftovers == []
    assert folder_bytes(tmp_path / "set") == folder_bytes(finished)


def test_a_task_clears_leftovers_of_its_own_share_while_no_other_count_is_at_work(
    tmp_path: Path,
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for unit in range(4):
        (parts / f".unit-{unit:08d}.ids.0123456789abcdef.partial").touch()
    other = tmp_path / ".task-0-of-3.lock"
    other.touch()
    staging = Staging(tmp_path, Share(1, 2))
    staging.clear_leftovers()
    assert len(list(parts.iterdir())) == 4
    other.unlink()
    staging.clear_leftovers()
    assert sorted(int(path.name[6:14]) for path in parts.iterdir()) == [0, 2]


def test_sigterm_is_no_death_at_work_and_a_crew_that_got_done_clears_the_mark(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    builder = start_builder(tmp_path, corpus_path, tmp_path / "set", tokenizer_path, workers=1)
    go_on(builder, 1)
    [mark] = (tmp_path / "set").glob(".partial-*/at_work")
    builder.terminate()
    builder.communicate()
    assert builder.returncode == -signal.SIGTERM
    assert not mark.exists()
    mark.touch()
    options = {"unit_bytes": 900, "train_split": 0.8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mamba_dist.data.preparation.build.merge_parts", _fail)
        with pytest.raises(DataError, match="no merge"):
            build(corpus_path, tmp_path / "set", tokenizer_path, **options)
    assert not mark.exists()


def _fail(*_: object, **__: object) -> None:
    raise DataError("no merge")


def test_a_journal_line_of_other_slices_is_not_taken_for_the_unit(
    corpus_path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    parts = interrupt(tmp_path, corpus_path, tokenizer_path, units=2)
    files = discover([corpus_path], DiscoveryOptions()).files
    units = {unit.index: unit for unit in cut_units(files, unit_bytes=900)}
    made = Staging(parts.parent).finished(units)
    assert len(made) >= 2
    moved = {index: replace(units[index + 1], index=index) for index in made}
    assert Staging(parts.parent).finished(moved) == {}
