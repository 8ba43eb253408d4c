"""Two checkpoints: one changed element is found wherever it stands and however each was cut."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_checkpoint import SHAPES, State, run_config, state_of, write_as_ranks

from mamba_dist.checkpoint.comparison import field_differences, state_differences
from mamba_dist.checkpoint.inspection import state_bytes
from mamba_dist.checkpoint.manifest import read_manifest
from mamba_dist.checkpoint.reader import CheckpointReader
from mamba_dist.data.segments import RunOrder, SourceContent, SourceRecord, first_segment
from mamba_dist.engine.base import STATE_KINDS
from mamba_dist.errors import CheckpointError


def readers(
    folder: Path, first: State, second: State, *, sizes: tuple[int, int] = (1, 3)
) -> tuple[CheckpointReader, CheckpointReader]:
    return (
        CheckpointReader(write_as_ranks(folder / "first", 5, sizes[0], state=first)),
        CheckpointReader(write_as_ranks(folder / "second", 5, sizes[1], state=second, flat=True)),
    )


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    name=st.sampled_from(sorted(SHAPES)),
    kind=st.sampled_from(STATE_KINDS),
    place=st.integers(0, 99),
)
def test_a_single_changed_element_is_found_across_any_cuts(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int],
    name: str,
    kind: str,
    place: int,
) -> None:
    first, second = state_of(5), state_of(5)
    changed = second[name][kind].view(-1)
    changed[place % changed.numel()] += 0.5
    pair = readers(tmp_path_factory.mktemp("pair"), first, second, sizes=sizes)
    advanced: list[int] = []
    (found,) = state_differences(*pair, block_numel=4, advance=advanced.append)
    assert (found.name, found.kind, found.differing) == (name, kind, 1)
    assert found.numel == changed.numel()
    delta = (second[name][kind].double() - first[name][kind].double()).norm()
    assert found.max_difference == pytest.approx(float(delta), rel=1e-12)
    expected = float(delta / first[name][kind].double().norm())
    assert found.relative_l2 == pytest.approx(expected, rel=1e-12)
    assert sum(advanced) == state_bytes(pair[0].manifest)


def test_the_same_state_is_equal_however_it_was_cut_non_finite_elements_included(
    tmp_path: Path,
) -> None:
    state = state_of(5)
    state["a"]["master"][1, 1] = math.nan
    state["b"]["exp_avg"][0] = math.inf
    assert state_differences(*readers(tmp_path, state, state), block_numel=4) == []


def test_an_equal_nan_does_not_hide_how_far_another_element_is_off(tmp_path: Path) -> None:
    first, second = state_of(5), state_of(5)
    for state, value in ((first, 1.0), (second, 1.5)):
        state["a"]["master"][1, 1] = math.nan
        state["a"]["master"][0, 3] = value
        state["b"]["master"][1] = math.inf
        state["b"]["master"][2] = value
    found = state_differences(*readers(tmp_path, first, second), block_numel=4)
    assert [(f.name, f.differing, f.max_difference) for f in found] == [
        ("a", 1, 0.5),
        ("b", 1, 0.5),
    ]
    assert all(math.isnan(f.relative_l2) for f in found)


def test_the_worst_comes_first_and_what_is_not_finite_is_worst(tmp_path: Path) -> None:
    first, second = state_of(5), state_of(5)
    first["c"]["exp_avg"].zero_()
    second["c"]["exp_avg"].fill_(-0.0)
    second["a"]["master"] *= 1.01
    second["b"]["master"] *= 1.1
    second["b"]["exp_avg_sq"][1] = math.nan
    found = state_differences(*readers(tmp_path, first, second), block_numel=2)
    assert [(f.name, f.kind) for f in found] == [
        ("b", "exp_avg_sq"),
        ("b", "master"),
        ("a", "master"),
        ("c", "exp_avg"),
    ]
    assert math.isnan(found[0].max_difference)
    assert found[1].relative_l2 == pytest.approx(0.1, rel=1e-5)
    assert (found[3].max_difference, found[3].relative_l2, found[3].differing) == (0.0, 0.0, 1)


def test_another_model_is_refused_by_its_parameter_and_fields(tmp_path: Path) -> None:
    other = {**state_of(5), "b": {kind: torch.zeros(8) for kind in STATE_KINDS}}
    first = CheckpointReader(write_as_ranks(tmp_path / "first", 5, 1))
    config = run_config(expand=3)
    second = CheckpointReader(write_as_ranks(tmp_path / "s", 5, 2, state=other, config=config))
    with pytest.raises(
        CheckpointError, match=r"parameter b has shape \[7\] and \[8\] \(model\.expand 2 and 3\)"
    ):
        state_differences(first, second)


def test_fields_say_whether_training_would_go_on_differently(tmp_path: Path) -> None:
    def segments(path: str, samples: int):
        content = SourceContent(1, 1, 1, 1, 1, "0", 9, 0, 0.9, 0.1)
        source = SourceRecord(path, "f", 1.0, None, samples, content)
        order = RunOrder([first_segment([source], global_batch_size=4)], seed=0, shuffle=True)
        return order.segments

    config = run_config()
    engine = config.engine.model_copy(update={"zero_stage": config.engine.zero_stage + 1})
    moved = config.model_copy(update={"engine": engine})
    base = read_manifest(write_as_ranks(tmp_path / "0", 5, 1, segments=segments("old", 9)))
    elsewhere = read_manifest(
        write_as_ranks(tmp_path / "1", 5, 2, segments=segments("new", 9), config=moved)
    )
    differences = field_differences(base, elsewhere)
    assert {d.name: (d.first, d.second) for d in differences} == {
        "world_size": (1, 2),
        "config.engine.zero_stage": (config.engine.zero_stage, config.engine.zero_stage + 1),
    }
    assert not any(d.is_state for d in differences)
    further = read_manifest(
        write_as_ranks(tmp_path / "2", 6, 1, segments=segments("old", 8), next_sample=20)
    )
    differences = field_differences(base, further)
    assert {d.name for d in differences if d.is_state} == {
        "step",
        "trained_tokens",
        "adam_steps",
        "segments",
    }
