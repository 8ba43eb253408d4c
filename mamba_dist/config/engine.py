"""The engine section of the run configuration, see schema.py."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mamba_dist.config.section import Section


class EngineConfig(Section):
    """How parameters and optimizer state are spread over ranks."""

    kind: Literal["zero", "fsdp2"] = "zero"
    """zero is DeepSpeed ZeRO; fsdp2 is PyTorch's fully_shard, which shards parameters, gradients
    and AdamW's state on any number of ranks. Either goes on from the other's checkpoints."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """0 replicates, 1 shards AdamW's state, 2 also gradients, 3 parameters too; one rank runs 0.
    null is 1 for kind zero, and the only choice for fsdp2, which has no stages."""
    reshard_after_forward: bool = True
    """fsdp2: give up a layer's whole parameters between its forward and its backward pass; false
    keeps them, which saves half of the gathering for 4 bytes a parameter."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """fsdp2 at precision bf16: how in_proj and out_proj, nearly all of a layer, are gathered. bf16
    halves that traffic, and no rank holds their rounded copies between forward and backward pass;
    they are rounded for their products anyway. All other parameters are gathered in fp32."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradient reduction and ZeRO-3 gathering; bf16 halves the traffic and loses precision."""
    bucket_elements: int = Field(default=50_000_000, ge=1, le=10**10)
    """zero: gradients are reduced in buckets of about so many elements; fsdp2 reduces by layers."""
    cuda_graphs: bool = True
    """On a GPU at ZeRO stage 0 with the gpu ops: launch each micro-batch as one CUDA graph. Without
    effect elsewhere: other stages and fsdp2 communicate in between."""
    timeout_minutes: float = Field(default=10, gt=0, le=24 * 60)
    """A collective that takes longer ends the run."""
    hang_timeout_minutes: float | None = Field(default=8, gt=0, le=24 * 60)
    """A rank without a finished micro-batch for so long (at most 0.8 timeout_minutes) hangs: the
    stacks of all ranks are written and the run exits with 75, to be started again. All before the
    end of the first step may take longer, and so may a save, in which one that writes nothing for
    so long hangs; null does not watch."""
    ops_backend: Literal["auto", "reference", "torch", "cpu", "gpu", "cuda"] = "auto"
    """Implementation of scan and convolution; auto picks the best one this machine has."""

    @model_validator(mode="before")
    @classmethod
    def _default_stage(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and values.get("kind", "zero") == "zero"
            and values.get("zero_stage") is None
        ):
            return {**values, "zero_stage": 1}
        return values

    @property
    def hang_timeout_s(self) -> float | None:
        """Seconds without a sign of life after which a rank hangs; soon enough that no collective
        ends the run first, without its stacks."""
        if self.hang_timeout_minutes is None:
            return None
        return 60 * min(self.hang_timeout_minutes, 0.8 * self.timeout_minutes)
