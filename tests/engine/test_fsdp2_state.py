"""What FSDP2 keeps on each rank."""

import pytest

from mamba_dist.engine.fsdp2 import state_bytes


@pytest.mark.parametrize(
    ("ranks", "accumulation_steps", "reshard", "bytes_per_parameter"),
    [(1, 1, True, 16), (4, 1, True, 4), (4, 2, True, 4 + 4), (4, 2, False, 4 + 4 + 4)],
)
def test_the_state_of_a_rank_is_its_share_and_what_stays_whole(
    ranks: int, accumulation_steps: int, reshard: bool, bytes_per_parameter: int
) -> None:
    """fp32 parameter, gradient and two moments; gradients are whole between micro-batches."""
    found = state_bytes(
        1000, ranks=ranks, accumulation_steps=accumulation_steps, reshard_after_forward=reshard
    )
    assert found == 1000 * bytes_per_parameter
