"""The logs of all ranks as one."""

from pathlib import Path

import pytest

from mamba_dist.telemetry.log import RankLog, log_file
from mamba_dist.telemetry.merged_log import describe, last_words, merged, numbered


def write(run_dir: Path, rank: int, *lines: tuple[float, str, str]) -> None:
    log = RankLog(log_file(run_dir, rank))
    for at, kind, text in lines:
        log.say(kind, text, at=at)
    log.close()


def start(rank: int, host: str, *, at: float = 0.0) -> tuple[float, str, str]:
    return at, "START", f"rank {rank} of 4, host {host}, process {4000 + rank}; started by srun"


def test_what_ranks_say_alike_stands_there_once_and_the_rest_in_order_of_time(
    tmp_path: Path,
) -> None:
    for rank in range(4):
        host = f"node{rank // 2}"
        write(
            tmp_path,
            rank,
            start(rank, host, at=rank / 10),
            (1 + rank / 10, "INFO", "resumed after step 5"),
            *([(3.0, "WARNING", "late\nby far")] if rank == 2 else []),
            *([(2.0, "INFO", "saved")] if rank == 0 else []),
            *([(4.0, "INFO", "of one node")] if rank < 2 else []),
            (500.0, "INFO", "resumed after step 5"),
        )
    assert list(describe(merged(tmp_path))) == [
        "1970-01-01 00:00:00.000 [ranks 0-3] START started by srun",
        "1970-01-01 00:00:01.000 [ranks 0-3] resumed after step 5",
        "1970-01-01 00:00:02.000 [rank 0 node0] saved",
        "1970-01-01 00:00:03.000 [rank 2 node1] WARNING late\n  by far",
        "1970-01-01 00:00:04.000 [ranks 0-1 node0] of one node",
        "1970-01-01 00:08:20.000 [ranks 0-3] resumed after step 5",
    ]


def test_a_rank_that_repeats_itself_is_not_folded_with_itself(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path, rank, start(rank, "a"), (1.0, "INFO", "x"), (2.0, "INFO", "x"))
    assert [(one.at, sorted(one.speakers)) for one in merged(tmp_path) if one.text == "x"] == [
        (1.0, [0, 1]),
        (2.0, [0, 1]),
    ]


def test_a_run_of_one_rank_names_nobody(tmp_path: Path) -> None:
    write(tmp_path, 0, start(0, "a"), (1.0, "INFO", "saved"))
    assert list(describe(merged(tmp_path)))[1] == "1970-01-01 00:00:01.000 saved"


def test_the_older_half_of_a_log_comes_first(tmp_path: Path) -> None:
    write(tmp_path, 0, start(0, "a"), (1.0, "INFO", "first"))
    path = log_file(tmp_path, 0)
    path.rename(path.with_suffix(".old.log"))
    write(tmp_path, 0, (1.0, "INFO", "second"))
    assert [one.text for one in merged(tmp_path)] == ["started by srun", "first", "second"]


def test_last_words_are_those_of_the_last_start(tmp_path: Path) -> None:
    write(tmp_path, 0, start(0, "a"), (1.0, "END", "old"), start(0, "a", at=5.0), (6.0, "END", "x"))
    write(tmp_path, 1, start(1, "a"), (1.0, "END", "old"), start(1, "a", at=5.0))
    found = last_words(tmp_path, since=5.0)
    assert {rank: word and word.text for rank, word in found.items()} == {0: "x", 1: None}


def test_the_end_of_a_long_log_is_found(tmp_path: Path) -> None:
    lines = [(float(n), "INFO", "ä" * 100) for n in range(2000)]
    write(tmp_path, 0, *lines, (2000.0, "END", "x"))
    [word] = last_words(tmp_path, since=0.0).values()
    assert word is not None
    assert word.text == "x"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 9, 5, 6], "ranks 0-2, 5-6, 9"), ([4, 2], "ranks 2, 4")],
)
def test_ranks_are_told_as_spans(ranks: list[int], text: str) -> None:
    assert numbered("rank", ranks) == text
