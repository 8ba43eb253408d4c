import torch
import torch.nn.functional as F

from mamba_dist.model.norm import AddRMSNorm, GatedRMSNorm


def weights(width: int) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(1))


def test_add_rms_norm_under_autocast_rounds_only_its_normed_output() -> None:
    norm = AddRMSNorm(32, eps=1e-5, backend="torch")
    with torch.no_grad():
        norm.weight.copy_(weights(32))
    x, residual = 300 * torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    total = residual + x
    exact = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    normed, stream = norm(x, residual)
    torch.testing.assert_close(normed, exact)
    assert torch.equal(stream, total)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, stream = norm(x, residual)
    assert torch.equal(rounded, normed.bfloat16())
    assert stream.dtype == torch.float32
    assert torch.equal(stream, total)


def test_the_gated_norm_gates_first_and_normalises_each_group() -> None:
    norm = GatedRMSNorm(12, groups=3, eps=1e-5, backend="torch")
    with torch.no_grad():
        norm.weight.copy_(weights(12))
    x, z = torch.randn(2, 5, 4, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    gated = x * F.silu(z)
    parts = [
        part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5)
        for part in gated.split(4, -1)
    ]
    torch.testing.assert_close(norm(x, z), torch.cat(parts, -1) * norm.weight)
