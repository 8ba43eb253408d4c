"""Compares the native kernels with the reference; prints the instruction set that torch took.

A process of its own: torch reads ATEN_CPU_CAPABILITY when it is imported.
"""

import scan_cases
import test_causal_conv1d
import test_rms_norm
import test_ssd
import torch
from op_comparison import TOLERANCE, assert_agrees, packed

from mamba_dist.ops.causal_conv1d import causal_conv1d
from mamba_dist.ops.selective_scan import selective_scan
from mamba_dist.ops.ssd import ssd


def compare(dtype: torch.dtype) -> None:
    arguments = test_ssd.ssd_arguments(
        length=200, heads=5, headdim=19, d_state=21, seq_idx=packed(200)
    )
    assert_agrees(ssd, arguments, dtype, test_ssd.PER_POSITION, backend="cpu")
    for length, width in ((1, 4), (200, 2), (200, 4), (200, 6)):
        arguments = test_causal_conv1d.conv_arguments(
            length=length,
            channels=test_causal_conv1d.CHANNELS,
            width=width,
            seq_idx=packed(length),
        )
        assert_agrees(
            causal_conv1d, arguments, dtype, test_causal_conv1d.PER_POSITION, backend="cpu"
        )
    for with_residual in (False, True):
        made = test_rms_norm.made(5, 43, dtype=dtype, with_residual=with_residual)
        test_rms_norm.assert_close(made, dtype, "cpu")
    for length, d_state in ((1, scan_cases.D_STATE), (200, scan_cases.D_STATE), (130, 16)):
        for options in (False, True):
            arguments = scan_cases.scan_arguments(
                length=length,
                channels=scan_cases.CHANNELS,
                d_state=d_state,
                options=options,
                seq_idx=packed(length),
            )
            assert_agrees(selective_scan, arguments, dtype, scan_cases.PER_POSITION, backend="cpu")


if __name__ == "__main__":
    for tolerated in TOLERANCE:
        compare(tolerated)
    print(torch.backends.cpu.get_cpu_capability())
