"""DeepSpeed ZeRO behind the Engine protocol, stages 0 to 3.

DeepSpeed moves gradients and parameters; what a step means is decided here, so that every stage
does the same: the loss is averaged over real tokens, the norm is known before any update, a bad
step is dropped on all ranks. Precision is `torch_autocast` with an empty list of low-precision
modules: all parameters are stored, reduced and gathered in float32 (`bf16.enabled` would round
A_log, D and dt_bias).

Private parts of DeepSpeed are touched in this file only, but for one switch in world.py;
tests/engine/test_deepspeed_canary.py watches them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from mamba_dist.engine.adamw import adamw, judge, materialise_moments
from mamba_dist.engine.base import (
    Fragment,
    FragmentReader,
    OptimizerSettings,
    ParameterGroup,
    StepStats,
    flat_share,
    require_fp32,
    scaled_loss,
)
from mamba_dist.engine.graph import RecordedMicrosteps, Recorder
from mamba_dist.engine.world import World


def construction(settings: Mapping[str, Any]) -> AbstractContextManager[object]:
    """Context to build the module in: at stage 3 parameters are partitioned as they appear."""
    if settings["zero_optimization"]["stage"] != 3:
        return nullcontext()
    # An explicit dtype=float32 becomes bfloat16 on a CPU without float16 (0.19.8); from the
    # settings, which enable neither, it becomes float32.
    context: AbstractContextManager[object] = deepspeed.zero.Init(
        config_dict_or_path=dict(settings), mem_efficient_linear=False
    )
    return context


def gather(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    """Context in which `parameters` are whole; what rank 0 writes there becomes their value."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0
    )
    return context


class ZeroEngine:
    """A module under DeepSpeed ZeRO, see `mamba_dist.engine.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        settings: Mapping[str, Any],
        world: World,
        recorder: Recorder | None = None,
    ) -> None:
        """See `Engine`.

        Args:
            settings: of `zero_settings`.
            recorder: launch forward and backward of a micro-batch as a whole, recorded by this.

        Raises:
            ValueError: a recorder above stage 0, where gradients are reduced in between.
        """
        require_fp32(module)
        self._world = world
        self._stage: int = settings["zero_optimization"]["stage"]
        if recorder is not None and self._stage > 0:
            raise ValueError(f"stage {self._stage} cannot be recorded, only stage 0")
        self._parameters = dict(module.named_parameters())
        self._adamw = adamw(self._parameters, groups, optimizer)
        if self._stage == 3:
            _gather_layers_whole(module)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self._adamw,
            config=dict(settings),
            dist_init_required=False,
        )
        require_fp32(module)
        self._norm = float("nan")
        self._skip_above = float("inf")
        if self._stage == 0 and world.size == 1:
            # Their mean over one rank is what gradients are already; DeepSpeed would flatten,
            # divide and copy them all.
            self._engine.enable_backward_allreduce = False
        if self._stage in (1, 2):
            self._share_masters()
        if self._stage > 0:
            self._watch_norm()
        materialise_moments(self._adamw, self._masters())
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self._recorded: RecordedMicrosteps | None = None
        if recorder is not None:
            self._recorded = RecordedMicrosteps(
                self._loss_sum, parameters=list(self._parameters.values()), recorder=recorder
            )

    @property
    def module(self) -> nn.Module:
        """The wrapped module; at stage 3 its parameters are empty outside of `gather`."""
        module: nn.Module = self._engine.module
        return module

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has applied."""
        return int(self._adamw.state[self._masters()[0]]["step"].item())

    def forward_backward(
        self, inputs: Mapping[str, Tensor], *, step_tokens: int, last: bool
    ) -> Tensor:
        """Loss sum of one micro-batch, () fp32; see the protocol."""
        # It walks over all modules, which takes as long as several layers' kernels.
        if not self._engine.training or not self.module.training:
            self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        # ZeRO averages gradients over ranks; the denominator is already global.
        scale = self._world.size / step_tokens
        if self._recorded is not None:
            recorded_loss_sum = self._recorded(inputs, scale=scale)
            if self._engine.enable_backward_allreduce:
                self._engine.allreduce_gradients()
            return recorded_loss_sum
        with _rounding_anew():
            loss_sum: Tensor = self._engine(**self._to_device(inputs))
        self._engine.backward(scaled_loss(loss_sum, scale=scale), scale_wrt_gas=False)
        return loss_sum.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the module returns for `inputs`, without gradients."""
        self._engine.eval()
        with _rounding_anew():
            output: Tensor = self._engine(**self._to_device(inputs))
        return output

    def step(
        self, lr: float, *, max_grad_norm: float | None, skip_above: float | None
    ) -> StepStats:
        """Clips and applies the accumulated gradients, or drops them on all ranks."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            return self._step_replicated(max_grad_norm=max_grad_norm, skip_above=skip_above)
        self._skip_above = float("inf") if skip_above is None else skip_above
        self._optimizer.clip_grad = 0.0 if max_grad_norm is None else max_grad_norm
        self._engine.step()
        return StepStats(grad_norm=self._norm, skipped=not self._engine.was_step_applied())

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of parameters and moments; over all ranks every element occurs once."""
        for name, parameter in self._parameters.items():
            fragment = self._fragment(name, parameter)
            if fragment is not None and fragment.master.numel():
                yield fragment

    @torch.no_grad()
    def load_fragments(self, reader: FragmentReader, *, adam_steps: int) -> None:
        """Overwrites parameters, moments and AdamW's step from `reader`."""
        for name, parameter in self._parameters.items():
            # Stage 0 keeps whole replicas, of which `fragments` names only this rank's part to
            # write.
            own = (
                self._replica(name, parameter)
                if self._stage == 0
                else self._fragment(name, parameter)
            )
            # Of a parameter with fewer elements than ranks, some own nothing.
            if own is None or not own.master.numel():
                continue
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                target = own.tensor(kind)
                target.copy_(reader.read(name, kind, start=own.start, numel=target.numel()))
            if self._stage == 3:
                partition: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
                partition.flatten()[: own.master.numel()].copy_(own.master)
        for master in self._masters():
            self._adamw.state[master]["step"].fill_(float(adam_steps))
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3 and self._optimizer.persistent_parameters:
            persistent = self._optimizer.persistent_parameters
            # Gathering leaves those alone that are whole, from an earlier load or a skipped step.
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def gather(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        """Context in which `parameters` are whole; what rank 0 writes there becomes their value."""
        return gather(parameters)

    def _loss_sum(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """As DeepSpeed runs the module."""
        autocast = torch.autocast(
            self._world.device.type,
            self._engine.torch_autocast_dtype(),
            enabled=self._engine.torch_autocast_enabled(),
            # See `_rounding_anew`.
            cache_enabled=False,
        )
        with autocast:
            loss_sum: Tensor = self.module(**inputs)
        return loss_sum

    def _to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self._world.device, non_blocking=True) for k, v in inputs.items()}

    def _step_replicated(
        self, *, max_grad_norm: float | None, skip_above: float | None
    ) -> StepStats:
        # DeepSpeed at stage 0 neither reports a norm nor skips (measured: one NaN made all weights
        # NaN).
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        stats = judge(self._adamw, norm, max_grad_norm=max_grad_norm, skip_above=skip_above)
        self._engine.step()
        return stats()

    def _is_bad(self, norm: float) -> bool:
        # As in `judge`, on the host.
        return not norm <= self._skip_above or norm == float("inf")

    def _watch_norm(self) -> None:
        """Lets this engine see the norm before any update, and veto the step.

        DeepSpeed drops a step on all ranks when the norm it has just computed is not finite;
        answering inf in its place makes it drop a spike by the same path. It marks NaN and inf by
        -1.
        """

        def judged(norm: Tensor) -> Tensor:
            value = float(norm)
            self._norm = float("nan") if value < 0 else value
            return torch.full_like(norm, float("inf")) if self._is_bad(self._norm) else norm

        if self._stage == 3:
            norm_groups = self._optimizer._get_norm_groups
            combined = deepspeed.runtime.zero.stage3.combine_grad_norm_groups
            self._optimizer._get_norm_groups = lambda: [judged(combined(norm_groups()))]
        else:
            global_norm = self._optimizer.scaled_global_norm
            self._optimizer.scaled_global_norm = lambda: judged(global_norm())

    def _share_masters(self) -> None:
        """Makes AdamW update this rank's part of the parameters themselves.

        DeepSpeed updates a copy, since its parameters are mostly 16 bits wide; ours are fp32, and
        the copy would only take memory and be copied back in each step.
        """
        partitions = self._optimizer.parallel_partitioned_bit16_groups
        for master, parts in zip(self._masters(), partitions, strict=True):
            master.data = parts[self._world.rank]
        self._optimizer._link_all_hp_params()

    def _masters(self) -> list[Tensor]:
        """The tensors that AdamW updates: parameters at stage 0, this rank's flat parts above."""
        if self._stage == 0:
            return list(self._parameters.values())
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        if self._stage == 0:
            whole = self._replica(name, parameter)
            start, numel = flat_share(
                whole.master.numel(), rank=self._world.rank, world_size=self._world.size
            )
            part = slice(start, start + numel)
            return Fragment(
                name,
                whole.shape,
                start,
                whole.master[part],
                whole.exp_avg[part],
                whole.exp_avg_sq[part],
            )
        if self._stage == 3:
            return self._partition(name, parameter)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return Fragment(
            name,
            tuple(parameter.shape),
            mapping.lp_fragment_address.start,
            mapping.get_hp_fragment(),
            mapping.get_hp_fragment("exp_avg"),
            mapping.get_hp_fragment("exp_avg_sq"),
        )

    def _replica(self, name: str, parameter: nn.Parameter) -> Fragment:
        state = self._adamw.state[parameter]
        return Fragment(
            name,
            tuple(parameter.shape),
            0,
            parameter.detach().flatten(),
            state["exp_avg"].flatten(),
            state["exp_avg_sq"].flatten(),
        )

    def _partition(self, name: str, parameter: nn.Parameter) -> Fragment:
        # Partitions are ceil(numel / world) long, the last ones padded; padding is never written.
        start, numel = flat_share(
            parameter.ds_numel,  # type: ignore[attr-defined]
            rank=self._world.rank,
            world_size=self._world.size,
        )

        def local(key: str | None = None) -> Tensor:
            tensor: Tensor = self._optimizer.get_local_fp32_param(parameter, key)
            return tensor[:numel]

        return Fragment(
            name,
            tuple(parameter.ds_shape),  # type: ignore[attr-defined]
            start,
            local(),
            local("exp_avg"),
            local("exp_avg_sq"),
        )


@contextmanager
def _rounding_anew() -> Iterator[None]:
    """Context in which autocast keeps nothing for a second use, which no weight has in a forward.

    Its cache would hold a rounded copy of each until the whole forward pass is over, 2 bytes a
    parameter, also where a layer's activations are not kept.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _gather_layers_whole(module: nn.Module) -> None:
    """Has ZeRO-3 gather and release the parameters of each layer at once.

    By default it hooks into every module of a layer and fetches it alone: with Mamba's eight small
    modules a layer, most of a step was Python between kernels.
    """
    for layers in module.modules():
        if isinstance(layers, nn.ModuleList):
            for layer in layers:
                deepspeed.utils.set_z3_leaf_module(layer, True)
