"""torch's FSDP2 (`fully_shard`) behind the Engine protocol.

Each layer is a unit: its parameters are gathered from all ranks before it runs, given up after it,
gathered again for its backward pass, and its gradients are summed into the rank that owns them. The
rest of the module is the last unit. A rank owns rows: parameters are cut along their first
dimension into as many equal parts as there are ranks, the last ones shorter or empty.

Precision is what the ZeRO engine has: parameters are stored, gathered and reduced in float32, and
autocast rounds what goes into matrix products. FSDP2's own way, a MixedPrecisionPolicy with
param_dtype bfloat16, rounds all parameters of a unit, so only units without A_log, D, dt_bias or a
norm may have it: the large projections, where they are asked for. Autocast would round them the
same; but it keeps what it has rounded for the backward pass, and FSDP2 gathers it again.

Bytes that a rank receives per parameter, times (ranks - 1) / ranks: 4 for each gathering, 2 in
bfloat16, of which a micro-batch has two (one if parameters stay after the forward pass), and 4 for
the gradients of a step, 2 if they are reduced in bfloat16.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mamba_dist.engine.adamw import adamw, judge, materialise_moments
from mamba_dist.engine.base import (
    STATE_KINDS,
    Fragment,
    FragmentReader,
    OptimizerSettings,
    ParameterGroup,
    StepStats,
    flat_share,
    require_fp32,
    scaled_loss,
)
from mamba_dist.engine.world import World

# Gradients come out of autograd in param_dtype, rounded as autocast rounds them, and are
# accumulated and reduced in reduce_dtype.
_ROUNDED: Final = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


@dataclass(frozen=True)
class Fsdp2Settings:
    """What of a run concerns FSDP2; the fields are those of the training and engine sections."""

    precision: Literal["bf16", "fp32"]
    gather_dtype: Literal["fp32", "bf16"]
    reduce_dtype: Literal["fp32", "bf16"]
    reshard_after_forward: bool


def construction() -> AbstractContextManager[object]:
    """Context to build the module in: its parameters take no memory until they are sharded."""
    return torch.device("meta")


class Fsdp2Engine:
    """A module under FSDP2, see `mamba_dist.engine.base.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        *,
        groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        settings: Fsdp2Settings,
        world: World,
        projections: Collection[nn.Module] = (),
    ) -> None:
        """See `Engine`.

        Args:
            projections: modules inside of layers that are gathered in `gather_dtype`. Each call of
                a layer calls their forward, and nobody else reads their parameters.
            module: built in `construction` its parameters are sharded layer by layer, and have no
                values before they are written in `gather`; otherwise they keep their values.
        """
        require_fp32(module)
        self._world = world
        self._settings = settings
        self._module = module
        rounded = frozenset(projections if settings.gather_dtype == "bf16" else ())
        self._units = _shard(module, rounded=rounded, settings=settings, world=world)
        self._reduces = True
        self._parameters = {n: cast(DTensor, p) for n, p in module.named_parameters()}
        self._owners = _owners(module)
        with torch.no_grad():
            # Ordinary tensors on the memory of the shards: AdamW on DTensors takes longer to
            # dispatch each of its operations than the device to run it.
            self._masters = {n: p.to_local().detach() for n, p in self._parameters.items()}
        self._adamw = adamw(self._masters, groups, optimizer)
        materialise_moments(self._adamw, self._masters.values())

    @property
    def module(self) -> nn.Module:
        """The wrapped module; its parameters are DTensors outside of `gather`."""
        return self._module

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has applied."""
        return int(self._adamw.state[next(iter(self._masters.values()))]["step"].item())

    def forward_backward(
        self, inputs: Mapping[str, Tensor], *, step_tokens: int, last: bool
    ) -> Tensor:
        """Loss sum of one micro-batch, () fp32; see the protocol."""
        # It walks over all modules, which takes as long as several layers' kernels.
        if not self._module.training:
            self._module.train()
        self._reduce_after_backward(last)
        loss_sum = self._run(inputs)
        scaled_loss(loss_sum, scale=1 / step_tokens).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the module returns for `inputs`, without gradients."""
        self._module.eval()
        output = self._run(inputs)
        # The last unit keeps its parameters for a backward pass that never comes, and would miss
        # what is loaded into the shards meanwhile.
        for unit in self._units:
            unit.reshard()
        return output

    @torch.no_grad()
    def step(
        self, lr: float, *, max_grad_norm: float | None, skip_above: float | None
    ) -> StepStats:
        """Clips and applies the accumulated gradients, or drops them on all ranks."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, parameter in self._parameters.items():
            gradient = cast(DTensor | None, parameter.grad)
            self._masters[name].grad = None if gradient is None else gradient.to_local()
        stats = judge(
            self._adamw,
            self._global_norm(),
            max_grad_norm=max_grad_norm,
            skip_above=skip_above,
        )
        self._adamw.step()
        for name, parameter in self._parameters.items():
            self._masters[name].grad = parameter.grad = None
        return stats()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of parameters and moments; over all ranks every element occurs once."""
        for name, parameter in self._parameters.items():
            if self._masters[name].numel():
                yield self._fragment(name, parameter)

    @torch.no_grad()
    def load_fragments(self, reader: FragmentReader, *, adam_steps: int) -> None:
        """Overwrites parameters, moments and AdamW's step from `reader`."""
        for own in self.fragments():
            for kind in STATE_KINDS:
                target = own.tensor(kind)
                target.copy_(reader.read(own.name, kind, start=own.start, numel=target.numel()))
        for master in self._masters.values():
            self._adamw.state[master]["step"].fill_(float(adam_steps))

    @contextmanager
    def gather(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Context in which the module holds whole tensors in place of `parameters`.

        What rank 0 writes there becomes their value.
        """
        whole = {p: nn.Parameter(cast(DTensor, p).full_tensor().detach()) for p in parameters}
        self._put(whole)
        try:
            yield
        finally:
            self._put({old: old for old in whole})
        for parameter, values in whole.items():
            self._take_share(cast(DTensor, parameter), values.detach())

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        device = self._world.device
        # Its cache would hold a rounded copy of each weight until the whole forward pass is over.
        with torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=self._settings.precision == "bf16",
            cache_enabled=False,
        ):
            output: Tensor = self._module(
                **{k: v.to(device, non_blocking=True) for k, v in inputs.items()}
            )
        return output

    def _reduce_after_backward(self, reduces: bool) -> None:
        if reduces == self._reduces:
            return
        self._reduces = reduces
        for unit in self._units:
            unit.set_requires_gradient_sync(reduces, recurse=False)
            # The next micro-batch finds them where they are to stay after the forward pass anyway.
            unit.set_reshard_after_backward(
                reduces or self._settings.reshard_after_forward, recurse=False
            )

    def _global_norm(self) -> Tensor:
        """The L2 norm of all ranks' gradients, () fp32, on the device."""
        gradients = [
            m.grad for m in self._masters.values() if m.grad is not None and m.grad.numel()
        ]
        # Squares of ordinary norms overflow in fp32 long before anything is wrong with them.
        squared = torch.zeros((), dtype=torch.float64, device=self._world.device)
        if gradients:
            squared += torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if self._world.size > 1:
            dist.all_reduce(squared)
        return squared.sqrt().float()

    def _fragment(self, name: str, parameter: DTensor) -> Fragment:
        master = self._masters[name]
        state = self._adamw.state[master]
        first_row, _ = self._rows(parameter)
        return Fragment(
            name,
            tuple(parameter.shape),
            first_row * parameter.shape[1:].numel(),
            master.flatten(),
            state["exp_avg"].flatten(),
            state["exp_avg_sq"].flatten(),
        )

    def _rows(self, parameter: DTensor) -> tuple[int, int]:
        """First row and number of rows that this rank owns."""
        return flat_share(parameter.shape[0], rank=self._world.rank, world_size=self._world.size)

    def _put(self, tensors: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for old, new in tensors.items():
            for owner, name in self._owners[old]:
                setattr(owner, name, new)

    @torch.no_grad()
    def _take_share(self, parameter: DTensor, values: Tensor) -> None:
        if self._world.size > 1:
            dist.broadcast(values, src=0)
        first, count = self._rows(parameter)
        parameter.to_local().copy_(values[first : first + count])


class _RoundedReduceScatter:
    """Sums gradients over ranks in bfloat16; they are accumulated and kept in float32.

    The reduce_dtype of FSDP2's MixedPrecisionPolicy would accumulate in it, too.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        rounded = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.reduce_scatter_tensor(rounded, input_tensor.bfloat16(), op=op, group=group)
        output_tensor.copy_(rounded)


def _shard(
    module: nn.Module, *, rounded: Collection[nn.Module], settings: Fsdp2Settings, world: World
) -> list[FSDPModule]:
    """The units, inner ones first: what is rounded of each layer of a ModuleList, the rest of it,
    and the rest of the module."""
    # Layers give out views, and nothing here adds to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    units: list[FSDPModule] = []
    for layers in [m for m in module.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            _materialise(layer, world.device)
            reshard = settings.reshard_after_forward
            if members := [member for member in layer.modules() if member in rounded]:
                units += fully_shard(
                    members, mesh=mesh, reshard_after_forward=reshard, mp_policy=_ROUNDED
                )[:1]  # They share one state.
            units.append(fully_shard(layer, mesh=mesh, reshard_after_forward=reshard))
    _materialise(module, world.device)
    units.append(fully_shard(module, mesh=mesh))
    for unit in units:
        # A sum over ranks: the loss is divided by the labels of all of them already. One rank's
        # gradients would be copied for the division.
        if world.size > 1:
            unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if settings.reduce_dtype == "bf16":
            unit.set_custom_reduce_scatter(cast(Any, _RoundedReduceScatter()))
    return units


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Gives parameters on the meta device memory without values; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for (owner, name), parameter in _places(module):
        if parameter.is_meta:
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(owner, name, made[parameter])


def _owners(module: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Where each parameter is registered."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for place, parameter in _places(module):
        owners.setdefault(parameter, []).append(place)
    return owners


def _places(module: nn.Module) -> list[tuple[tuple[nn.Module, str], nn.Parameter]]:
    return [
        ((owner, name), parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]
