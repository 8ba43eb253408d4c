"""Gap positions: what they do to the reference, and around a stand-in of mamba-ssm's scan."""

from typing import Any

import fake_cuda_packages
import pytest
import torch
from cuda_cases import DTYPES, SCAN_PER_POSITION, scan_arguments
from fake_cuda_packages import Calls
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import assert_agrees, document_ids, leaves, relative_error, run
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.ops.selective_scan import reference, selective_scan
from mamba_dist.ops.selective_scan.gaps import GAP_STEP, find_gaps


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return fake_cuda_packages.install(monkeypatch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_gaps_alone_do_what_seq_idx_does(data: st.DataObject) -> None:
    """The reference without documents on rows with gaps equals it with documents, in fp64."""
    lengths = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3)
    )
    longest = max(map(sum, lengths))
    seq_idx = document_ids(*([*row, longest - sum(row)] for row in lengths))
    arguments = leaves(
        scan_arguments(batch=len(lengths), length=longest, seq_idx=seq_idx)
        | {"initial_state": None},
        torch.float64,
        set(),
    )

    def through_gaps(return_final_state: bool, **values: Any) -> tuple[Tensor, Tensor]:
        gaps = find_gaps(values["seq_idx"], values["A"])
        if gaps is None:
            return reference.selective_scan(**values)
        longer = {n: gaps.insert(values[n], gap=0.0) for n in ("u", "z")}
        longer |= {
            n: gaps.insert(values[n].flatten(2), gap=0.0).unflatten(2, values[n].shape[2:])
            for n in ("B", "C")
        }
        longer["delta"] = gaps.insert(values["delta"], gap=GAP_STEP)
        y, final_state = reference.selective_scan(**values | longer | {"seq_idx": None})
        return gaps.remove(y), final_state

    found = run(through_gaps, arguments)
    for name, value in run(selective_scan, arguments, backend="reference").items():
        assert relative_error(found[name], value) < 1e-13, name


def test_rows_with_fewer_boundaries_end_on_their_own_last_position() -> None:
    gaps = find_gaps(document_ids([2, 1, 2], [5], [4, 1]), -torch.ones(1, 1))
    assert gaps is not None
    assert gaps.length == 7
    rows = [[0, 1, 3, 5, 6], [2, 3, 4, 5, 6], [1, 2, 3, 4, 6]]
    assert gaps.index.view(3, 5).tolist() == [
        [7 * r + p for p in row] for r, row in enumerate(rows)
    ]


@pytest.mark.parametrize("value", [0.0, 0.5, -1e-10])
@pytest.mark.usefixtures("calls")
def test_documents_with_a_state_that_cannot_be_wiped_out_are_refused(value: float) -> None:
    arguments = scan_arguments(seq_idx=document_ids([30, 34], [64]))
    arguments["A"][2, 1] = value
    inputs = leaves(arguments, torch.float32, set())
    with pytest.raises(BackendError, match=r"A is below -1e-09.*ops_backend: torch"):
        selective_scan(**inputs, backend="cuda")
    # Without documents any A is right.
    inputs["seq_idx"] = document_ids([64], [64])
    assert selective_scan(**inputs, backend="cuda").isfinite().all()


@pytest.mark.usefixtures("calls")
def test_the_slowest_state_that_is_accepted_is_wiped_out() -> None:
    arguments = scan_arguments(seq_idx=document_ids([30, 34], [64]))
    arguments["A"][:] = -1.01e-9
    for dtype in DTYPES:
        assert_agrees(selective_scan, arguments, dtype, SCAN_PER_POSITION, backend="cuda")
