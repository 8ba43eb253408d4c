"""The architecture, enforced: who may import whom, and who owns which third-party package."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamba_dist"

LAYERS = {
    "errors": 0,
    "config": 1,
    "ops": 1,
    "telemetry": 1,
    "model": 2,
    "data": 2,
    "engine": 2,
    "checkpoint": 3,
    "inference": 3,
    "train": 4,
    "commands": 5,
}

OWNERS = {
    "deepspeed": {"engine"},
    "torch.distributed": {"engine"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "sentencepiece": {"data"},
    "zstandard": {"data"},
    "xxhash": {"data"},
    "fastokens": {"data"},
    "orjson": {"data"},
    "platformdirs": {"ops"},
    "psutil": {"engine"},
    "triton": {"ops"},
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "yaml": {"config"},
    "tensorboard": {"telemetry"},
    "torch.utils.tensorboard": {"telemetry"},
    "tqdm": {"telemetry"},
    "matplotlib": {"telemetry"},
    "safetensors": {"checkpoint"},
    "transformers": {"checkpoint"},
    "mambapy": set(),
    "datasets": set(),
    "streaming": set(),
    "litdata": set(),
}

# What tools/bench.py measures against: optional packages, each known to one file.
PEERS = {
    "commands/bench/peers_huggingface.py": {"transformers"},
    "commands/bench/peers_mambapy.py": {"mambapy"},
    "commands/bench/peers_datasets.py": {"datasets", "transformers"},
    "commands/bench/peers_tokenize.py": {"tokenizers"},
    "commands/bench_read/peers_arrow.py": {"pyarrow"},
    "commands/bench_read/peers_datasets.py": {"datasets"},
    "commands/bench_read/peers_streaming.py": {"streaming"},
    "commands/bench_read/peers_litdata.py": {"litdata"},
}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc"}

LATE_IMPORTS = {
    # A config error must be printed before torch is imported.
    "commands/train.py": {"mamba_dist.train.run"},
    "commands/submit.py": {"mamba_dist.train.build", "mamba_dist.train.plan"},
    # Drawing needs an optional package, and only a picture that was asked for may need it.
    "commands/inspect_data.py": {"mamba_dist.telemetry.length_plot"},
    # A peer may be absent, and only the process that measures it may pay for importing it.
    "commands/bench/worker.py": {
        "mamba_dist.commands.bench.peers_huggingface",
        "mamba_dist.commands.bench.peers_mambapy",
    },
    "commands/bench/data_worker.py": {"mamba_dist.commands.bench.peers_datasets"},
    "commands/bench_read/maker.py": {"mamba_dist.commands.bench_read"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every imported module, and whether the import stands inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        late = id(node) in inside
        if isinstance(node, ast.Import):
            found += [(alias.name, late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            found.append((node.module or "", late))
            found += [(f"{node.module}.{alias.name}", late) for alias in node.names]
    return found


def rooms_imported(path: Path) -> set[str]:
    names = [name for name, _ in imported_names(ast.parse(path.read_text()))]
    return {name.split(".")[1] for name in names if name.startswith("mamba_dist.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_its_own_folder_or_a_lower_layer(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not rooms_imported(path)
        return
    wrong = {
        other for other in rooms_imported(path) if other != room and LAYERS[other] >= LAYERS[room]
    }
    assert not wrong, f"{room} (layer {LAYERS[room]}) must not import {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_packages_are_imported_by_their_owner_only(path: Path) -> None:
    measured = PEERS.get(str(path.relative_to(PACKAGE)), set())
    for name, _ in imported_names(ast.parse(path.read_text())):
        for package, owners in OWNERS.items():
            if name == package or name.startswith(f"{package}."):
                right = room_of(path) in owners or package in measured
                assert right, f"{name} belongs to {owners}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stand_at_the_top_of_their_file(path: Path) -> None:
    allowed = LATE_IMPORTS.get(str(path.relative_to(PACKAGE)), set())
    late = {
        name
        for name, is_late in imported_names(ast.parse(path.read_text()))
        if is_late and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    }
    assert not late


def test_config_needs_no_torch() -> None:
    for path in (PACKAGE / "config").rglob("*.py"):
        names = {name for name, _ in imported_names(ast.parse(path.read_text()))}
        assert not {name for name in names if name.split(".")[0] in {"torch", "numpy"}}, path


def test_reading_a_data_set_needs_nothing_that_prepares_one() -> None:
    for path in (PACKAGE / "data").glob("*.py"):
        names = {name for name, _ in imported_names(ast.parse(path.read_text()))}
        assert not {n for n in names if n.startswith("mamba_dist.data.preparation")}, path


def test_ops_never_sees_a_config() -> None:
    for path in (PACKAGE / "ops").rglob("*.py"):
        assert rooms_imported(path) <= {"ops", "errors"}, path


def test_checkpoint_never_sees_deepspeed_or_an_engine() -> None:
    for path in (PACKAGE / "checkpoint").rglob("*.py"):
        names = {name for name, _ in imported_names(ast.parse(path.read_text()))}
        engines = ("mamba_dist.engine.zero", "mamba_dist.engine.fsdp2", "deepspeed")
        assert not {n for n in names if n.startswith(engines)}, path


def test_the_environment_is_read_in_one_place() -> None:
    for path in modules():
        if path.relative_to(PACKAGE) == Path("engine/world.py"):
            continue
        reads = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
        ]
        assert not reads, f"{path} reads the environment at lines {reads}"


def test_no_room_is_called_after_nothing() -> None:
    for path in PACKAGE.rglob("*"):
        assert path.stem not in FORBIDDEN_NAMES, path


def test_scripts_hold_one_call_of_one_main() -> None:
    for script in [
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("launch/*.py"),
        *ROOT.glob("data_prep/*.py"),
    ]:
        tree = ast.parse(script.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not functions, f"{script}: code belongs to mamba_dist/commands"
        mains = [
            n.module
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("mamba_dist")
        ]
        assert mains == [f"mamba_dist.commands.{script.stem}"], script


def test_no_script_shadows_the_standard_library_but_the_one_that_cures_it() -> None:
    scripts = [*ROOT.glob("tools/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("data_prep/*.py")]
    shadowing = {
        s.relative_to(ROOT).as_posix() for s in scripts if s.stem in sys.stdlib_module_names
    }
    assert shadowing <= {"data_prep/tokenize.py"}
    assert [p.name for p in (ROOT / "data_prep").glob("*.py")] == ["tokenize.py"]


def test_every_folder_says_what_it_is_for() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
