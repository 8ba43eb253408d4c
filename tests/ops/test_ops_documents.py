"""Document boundaries: where states are reset and how rows are cut."""

import torch

from mamba_dist.ops.documents import Span, document_spans, reset_mask


def test_a_reset_is_each_change_of_id_even_back_to_an_old_one() -> None:
    mask = reset_mask(torch.tensor([[3, 3, 1, 3, 3], [0, 0, 0, 0, 0]], dtype=torch.int32))
    assert mask is not None
    assert mask.tolist() == [[False, False, True, True, False], [False] * 5]


def test_no_boundary_means_no_mask() -> None:
    assert reset_mask(None) is None
    assert reset_mask(torch.tensor([[7, 7, 7], [2, 2, 2]], dtype=torch.int32)) is None
    assert reset_mask(torch.tensor([[7], [2]], dtype=torch.int32)) is None


def test_rows_without_boundaries_stay_together() -> None:
    assert document_spans(None, batch=3, length=9) == [Span(0, 3, 0, 9)]


def test_rows_are_cut_one_by_one_at_their_own_boundaries() -> None:
    seq_idx = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.int32)
    spans = document_spans(seq_idx, batch=2, length=4)
    assert spans == [Span(0, 1, 0, 2), Span(0, 1, 2, 4), Span(1, 2, 0, 4)]
