import os
from pathlib import Path

import pytest

from mamba_dist.data.preparation.sources import DiscoveryOptions, InputFile, cut_units, discover
from mamba_dist.errors import DataError


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return folder


def names(*roots: Path, **options: object) -> list[str]:
    found = discover(list(roots), DiscoveryOptions(**options))  # type: ignore[arg-type]
    return [file.name for file in found.files]


def test_files_come_in_the_order_of_their_names_wherever_the_corpus_lies(tmp_path: Path) -> None:
    listed = ("b.txt", "a/z.py", "a/B.md", "a/b/c.rst", "c.jsonl")
    first = write(tmp_path / "one" / "corpus", *listed)
    second = write(tmp_path / "two" / "corpus", *reversed(listed))
    expected = ["a/B.md", "a/b/c.rst", "a/z.py", "b.txt", "c.jsonl"]
    assert names(first) == names(second) == [f"corpus/{name}" for name in expected]


def test_the_format_is_told_by_the_extension(tmp_path: Path) -> None:
    listed = ("a.jsonl", "b.jsonl.zst", "c.json.gz", "d.parquet", "e.arrow", "f.PY", "g.txt.xz")
    write(tmp_path, *listed, "h.arrow")
    (tmp_path / "e.arrow").write_bytes(b"ARROW1\0\0")
    corpus = discover([tmp_path], DiscoveryOptions())
    assert [(file.format, file.compression) for file in corpus.files] == [
        ("jsonl", "none"),
        ("jsonl", "zstd"),
        ("jsonl", "gzip"),
        ("parquet", "none"),
        ("arrow", "none"),
        ("text", "none"),
        ("text", "xz"),
        ("arrow_stream", "none"),
    ]


def test_hidden_entries_and_unknown_kinds_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", ".hidden.txt", ".git/x.txt", "b.bin", "c.bin", "Makefile")
    corpus = discover([tmp_path], DiscoveryOptions())
    assert [file.name for file in corpus.files] == [f"{tmp_path.name}/a.txt"]
    assert dict(corpus.ignored_extensions) == {".bin": 2, "(none)": 1}


def test_what_symbolic_links_repeat_is_seen_once(tmp_path: Path) -> None:
    write(tmp_path / "corpus", "docs/a.txt", "docs/b.txt")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus" / "docs")
    (tmp_path / "corpus" / "docs" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "z.txt").symlink_to(tmp_path / "corpus" / "docs" / "a.txt")
    corpus = discover([tmp_path / "corpus"], DiscoveryOptions())
    assert len(corpus.files) == 2
    assert corpus.duplicates == 1
    assert len(names(tmp_path / "corpus", tmp_path / "corpus" / "docs")) == 2


def test_a_linked_folder_outside_the_corpus_is_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere", "a.txt")
    write(tmp_path / "corpus", "b.txt")
    (tmp_path / "corpus" / "linked").symlink_to(outside)
    assert names(tmp_path / "corpus") == ["corpus/b.txt", "corpus/linked/a.txt"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("site-packages", ["a.py", "lib/b.py"]),
        ("*.py", []),
        ("lib/*", ["a.py"]),
        ("lib/site-packages/*", ["a.py", "lib/b.py"]),
        ("site-packages/", ["a.py", "lib/b.py"]),
        ("nothing", ["a.py", "lib/b.py", "lib/site-packages/c.py"]),
    ],
)
def test_globs_exclude_names_and_paths(tmp_path: Path, pattern: str, left: list[str]) -> None:
    corpus = write(tmp_path / "c", "a.py", "lib/b.py", "lib/site-packages/c.py", "d.txt")
    assert names(corpus, exclude=(pattern,)) == [
        f"c/{name}" for name in [*sorted([*left, "d.txt"])]
    ]


def test_given_extensions_replace_the_default_ones(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", "a.py", "b.log", "c.jsonl")
    assert names(corpus, extensions=frozenset({".log", ".jsonl"})) == ["c/b.log", "c/c.jsonl"]


def test_a_named_file_is_read_whatever_its_extension(tmp_path: Path) -> None:
    write(tmp_path, "LICENSE", "notes.weird")
    assert names(tmp_path / "LICENSE", tmp_path / "notes.weird") == ["LICENSE", "notes.weird"]


def test_the_output_folder_and_the_tokenizer_are_no_input(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "out/b.txt", "tokenizer.json")
    skip = (tmp_path / "out", tmp_path / "tokenizer.json")
    assert names(tmp_path, skip=skip) == [f"{tmp_path.name}/a.txt"]


def test_an_empty_corpus_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no files found in"):
        discover([tmp_path], DiscoveryOptions())


def test_a_corpus_of_other_files_names_their_kinds(tmp_path: Path) -> None:
    write(tmp_path, "a.pdf", "b.pdf", "c.png")
    with pytest.raises(DataError, match=r"only files of other kinds \(2 .pdf, 1 .png\)"):
        discover([tmp_path], DiscoveryOptions())


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        discover([tmp_path / "nowhere"], DiscoveryOptions())


def test_units_bundle_small_files_and_keep_the_order(tmp_path: Path) -> None:
    for number, size in enumerate((10, 20, 30, 500, 10, 10)):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    files = discover([tmp_path], DiscoveryOptions()).files
    units = cut_units(files, unit_bytes=60)
    assert [unit.bytes for unit in units] == [60, 500, 20]
    assert [unit.index for unit in units] == [0, 1, 2]
    assert tuple(piece.file for unit in units for piece in unit.slices) == files


def test_files_without_bytes_are_shared_out_by_their_number() -> None:
    files = [InputFile(f"{n}.txt", f"c/{n}.txt", 0, 0, "text", "none") for n in range(20_000)]
    units = cut_units(files, unit_bytes=1 << 25)
    assert max(len(unit.slices) for unit in units) < 5000
    assert [piece.file for unit in units for piece in unit.slices] == files


def test_large_files_are_cut_where_a_part_can_be_read_alone(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.arrow", "e.parquet"):
        (tmp_path / name).write_bytes(bytes(100))
    (tmp_path / "f.jsonl").write_bytes(bytes(60))
    files = discover([tmp_path], DiscoveryOptions()).files
    units = cut_units(files, unit_bytes=60)
    cut = [
        (Path(piece.file.path).name, piece.start_bytes, piece.stop_bytes)
        for unit in units
        for piece in unit.slices
    ]
    assert cut == [
        ("a.jsonl", 0, 50),
        ("a.jsonl", 50, 100),
        ("b.jsonl.gz", 0, 100),
        ("c.txt", 0, 100),
        ("d.arrow", 0, 100),
        ("e.parquet", 0, 50),
        ("e.parquet", 50, 100),
        ("f.jsonl", 0, 60),
    ]
    assert str(units[1]) == f"{tmp_path}/a.jsonl (bytes 50 to 99)"


def test_a_glob_finds_what_its_folder_would_under_the_same_names(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "c", "a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d.txt", ".git/e.jsonl", "f.odd"
    )
    assert names(corpus / "**" / "*.jsonl") == ["c/a.jsonl", "c/x/b.jsonl", "c/x/y/c.jsonl"]
    assert names(corpus / "**") == [name for name in names(corpus) if name != "c/f.odd"]
    assert discover([corpus / "**"], DiscoveryOptions()).duplicates == 0
    assert names(corpus / "*.odd") == ["c/f.odd"]
    assert names(corpus / "x*") == ["x/b.jsonl", "x/y/c.jsonl", "x/y/d.txt"]
    assert names(corpus / "x" / "y" / "[cd].*") == ["y/c.jsonl", "y/d.txt"]
    assert names(corpus / "**" / "*.jsonl", exclude=("y",)) == ["c/a.jsonl", "c/x/b.jsonl"]
    assert names(corpus / "**" / "*.jsonl", skip=(corpus / "a.jsonl",)) == [
        "c/x/b.jsonl",
        "c/x/y/c.jsonl",
    ]


def test_what_two_globs_match_is_seen_once(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", "a.jsonl", "b.txt")
    (corpus / "c.jsonl").symlink_to(corpus / "a.jsonl")
    found = discover([corpus / "*.jsonl", corpus / "a*", corpus], DiscoveryOptions())
    assert [file.name for file in found.files] == ["c/a.jsonl", "c/b.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    write(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_a_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.jsonl matches no file or folder"):
        discover([tmp_path / "*.jsonl"], DiscoveryOptions())


def test_a_glob_enters_each_folder_once_through_links_in_circles(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", "a.txt", "one/b.txt", "two/c.txt")
    for folder in ("one", "two"):
        for target in ("one", "two", "."):
            (corpus / folder / f"to-{target}").symlink_to(corpus / target)
    (corpus / "zero").symlink_to(corpus / "two")
    found = discover([corpus / "**" / "*.txt"], DiscoveryOptions())
    assert {Path(file.path).resolve() for file in found.files} == {
        corpus / "a.txt",
        corpus / "one" / "b.txt",
        corpus / "two" / "c.txt",
    }
    assert found.duplicates == 0
    # A folder that was entered under another name still matches under this one.
    assert names(corpus / "**" / "zero" / "*.txt") == ["c/zero/c.txt"]


def test_a_glob_does_not_enter_the_output_folder(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", "a.txt", "out/b.txt")
    assert names(corpus / "**" / "*.txt", skip=(corpus / "out",)) == ["c/a.txt"]
    assert names(corpus / "*", skip=(corpus / "out",)) == ["c/a.txt"]


@pytest.mark.parametrize("glob", [(), ("**", "*.txt")])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, glob: tuple[str, ...]) -> None:
    folder = write(tmp_path / "c", "a.txt", "closed/b.txt") / "closed"
    # A path longer than the system takes cannot be listed by any user.
    deep = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=deep)
        deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = deeper
    os.close(deep)
    with pytest.raises(DataError, match=r"cannot (list|read) .*too long"):
        discover([Path(tmp_path, "c", *glob)], DiscoveryOptions())
    assert names(Path(tmp_path, "c", *glob), exclude=("closed",)) == ["c/a.txt"]


@pytest.mark.parametrize("glob", [(), ("**", "*.txt")])
def test_folders_of_any_depth_are_walked(tmp_path: Path, glob: tuple[str, ...]) -> None:
    folders = [f"{tmp_path}/c" + "/d" * depth for depth in range(1200)]
    for folder in folders:
        os.mkdir(folder)
    file = Path(folders[-1], "a.txt")
    file.write_text("text")
    try:
        assert names(Path(tmp_path, "c", *glob)) == ["c/" + "d/" * 1199 + "a.txt"]
    finally:
        # What clears up after tests goes down by recursion.
        file.unlink()
        for folder in reversed(folders):
            os.rmdir(folder)


@pytest.mark.parametrize("glob", [(), ("*",), ("**",)])
def test_links_that_lead_nowhere_are_passed_over_and_counted(
    tmp_path: Path, glob: tuple[str, ...]
) -> None:
    corpus = write(tmp_path / "c", "a.txt")
    (corpus / "b.arrow").symlink_to("nowhere")
    (corpus / "b.txt").symlink_to("nowhere")
    (corpus / "loop").symlink_to("loop")
    (corpus / "through").symlink_to("a.txt/file")
    found = discover([Path(corpus, *glob)], DiscoveryOptions())
    assert [file.name for file in found.files] == ["c/a.txt"]
    assert found.ignored_extensions == (("(broken link)", 4),)


@pytest.mark.parametrize("name", ["*.txt", "a*", "**"])
def test_a_link_that_cannot_be_followed_can_be_excluded_from_a_glob(
    tmp_path: Path, name: str
) -> None:
    corpus = write(tmp_path / "c", "a.txt")
    (corpus / "ab.txt").symlink_to("n" * 300)
    with pytest.raises(DataError, match=r"cannot follow .*ab.txt: .*--exclude it"):
        names(corpus / name)
    assert names(corpus / name, exclude=("ab.*",)) == ["c/a.txt"]


def test_a_corpus_of_an_impossible_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*x: File name too long"):
        discover([tmp_path / ("x" * 300)], DiscoveryOptions())
    with pytest.raises(DataError, match="matches no file or folder"):
        discover([tmp_path / ("x" * 300 + "*")], DiscoveryOptions())


def test_a_pipe_that_is_named_is_told_to_come_through_standard_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe it in and give -"):
        discover([tmp_path / "pipe.txt"], DiscoveryOptions())
