"""tools/bench.py data-read as a user starts it: figures, wrong readers, absent ones, holes."""

import importlib.util
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from processes import run_script

from mamba_dist.commands.bench import main
from mamba_dist.commands.bench_read import sets, storage
from mamba_dist.commands.bench_read.maker import main as make
from mamba_dist.commands.bench_read.ours import open_windows
from mamba_dist.commands.bench_read.peers_arrow import open_windows as open_arrow
from mamba_dist.commands.bench_read.peers_megatron import open_windows as open_megatron
from mamba_dist.commands.bench_read.peers_memmap import open_windows as open_memmap
from mamba_dist.commands.bench_read.report import Runs, Sizes, tables
from mamba_dist.commands.bench_read.sets import SetTokens
from mamba_dist.commands.bench_read.spec import ColdOpen, WarmTurns
from mamba_dist.data.dataset import open_dataset

SCRIPT = "tools/bench.py"
OPEN = ColdOpen(0.001, 0.002, 4096, 100, cached_before_bytes=0, cached_bytes=8192)
FILES = Sizes(1, 1_000_000, 1_000_000)


def test_data_read_measures_each_reader_on_the_same_windows_and_names_an_absent_one(
    tmp_path: Path,
) -> None:
    done = run_script(
        SCRIPT,
        *("data-read", "--tokens", "300_000", "--rounds", "1", "--folder", tmp_path),
        *("--variants", "memmap,ours,pyarrow,streaming", "--json", "found.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    measured = {r["variant"]: r for r in found["records"] if r["variant"] != "streaming"}
    assert list(measured) == ["memmap", "ours", "pyarrow"]
    assert len({tuple(r["warm"][0]["sums"]) for r in measured.values()}) == 1
    for record in measured.values():
        assert record["cold"][0]["first_s"] > record["cold"][0]["open_s"] > 0
        assert min(record["warm"][0]["random_per_s"]) > 100
    assert f"### Cold open, {found['tokens']:,} tokens" in done.stdout
    if importlib.util.find_spec("streaming") is None:
        assert "mosaicml-streaming: not measured: No module named 'streaming'" in done.stdout
    kept = sorted(path.name for path in (tmp_path / "300000-tokens").iterdir())
    assert kept[:2] == ["memmap", "ours"]  # for the next run


def test_other_layouts_give_the_same_windows(tmp_path: Path) -> None:
    for variant in ("ours", "megatron", "memmap"):
        (tmp_path / variant).mkdir()
        made = make(variant, tmp_path / "ours", tmp_path / variant, tokens=20_000, sparse=False)
        assert made == {}
    expected = open_windows(tmp_path / "ours")
    for read in (
        open_memmap(tmp_path / "memmap"),
        open_megatron(tmp_path / "megatron"),
        open_arrow(tmp_path / "ours"),
    ):
        assert all(np.array_equal(read(number), expected(number)) for number in range(9))


def warm(
    *, sums: tuple[int, ...] = (5, 6), speeds: tuple[float, ...] = (100.0, 200.0)
) -> WarmTurns:
    return WarmTurns(speeds, speeds, private_bytes=3_000_000, sums=sums)


def runs(**of: WarmTurns) -> Runs:
    return Runs(
        9_000,
        4,
        dict.fromkeys(of, FILES),
        {},
        starts_s={name: [0.1] for name in of},
        cold={name: [OPEN] for name in of},
        warm={name: [turns] for name, turns in of.items()},
    )


def test_ratios_are_taken_within_turns() -> None:
    found = runs(memmap=warm(), ours=warm(speeds=(50.0, 400.0)))
    ratio = found.ratio("ours", lambda turns: turns.random_per_s)
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 1.25, 2.0)
    assert "| 1.25x (0.50x to 2.00x) |" in tables(found)


def test_a_reader_of_other_ids_is_named_and_gets_no_figures() -> None:
    found = runs(memmap=warm(), ours=warm(sums=(5, 7)))
    assert found.measured == ["memmap"]
    text = tables(found)
    assert "ours: wrong: 1 of 2 windows hold other ids" in text
    assert "| ours |" not in text


def test_files_that_stayed_in_the_page_cache_are_named() -> None:
    found = runs(memmap=warm())
    found.cold["memmap"] = [ColdOpen(0.1, 0.2, 0, 0, cached_before_bytes=500_000, cached_bytes=0)]
    assert "numpy.memmap: not cold: 50% of it stayed in the page cache" in tables(found)


def test_a_set_of_holes_is_as_long_as_it_says_and_both_readers_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "_SHARD_BYTES", 4 << 20)
    monkeypatch.setattr(sets, "_BATCH_TOKENS", 1 << 18)
    ours, flat = tmp_path / "ours", tmp_path / "flat"
    for folder, variant in ((ours, "ours"), (flat, "memmap")):
        folder.mkdir()
        assert make(variant, ours, folder, tokens=5_000_000, sparse=True) == {}
    assert open_dataset(ours).train.tokens == 3 * 2**21
    files = [path for folder in (ours, flat) for path in folder.iterdir()]
    assert storage.has_holes(files)
    assert sum(512 * path.stat().st_blocks for path in files) < 2_000_000
    read, expected = open_windows(ours), open_memmap(flat)
    compared = SetTokens(ours).compared()
    found = [read(number) for number in compared]
    assert sum(ids.any() for ids in found) == 24  # each batch begins with a mark of its own
    assert all(np.array_equal(expected(n), ids) for n, ids in zip(compared, found, strict=True))


def test_the_page_cache_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_000))
    storage.read_through([path])
    assert storage.cached_bytes([path]) == -(-1_000_000 // mmap.PAGESIZE) * mmap.PAGESIZE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "mosaic"], "--variants: mosaic unknown here"),
        (["--sparse", "--variants", "litdata"], "litdata unknown here, expected memmap, ours"),
        (["--folder", "nowhere"], "--folder: nowhere is no folder"),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data-read", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
