import torch
import torch.nn.functional as F

from mamba_dist.model.norm import GatedRMSNorm, RMSNorm


def weights(width: int) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(1))


def test_rms_norm_under_autocast_rounds_only_its_result() -> None:
    norm = RMSNorm(32, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(weights(32))
    x = 300 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, norm(x).bfloat16())


def test_the_gated_norm_gates_first_and_normalises_each_group() -> None:
    norm = GatedRMSNorm(12, groups=3, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(weights(12))
    x, z = torch.randn(2, 5, 4, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    gated = x * F.silu(z)
    parts = [
        part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5)
        for part in gated.split(4, -1)
    ]
    torch.testing.assert_close(norm(x, z), torch.cat(parts, -1) * norm.weight)
