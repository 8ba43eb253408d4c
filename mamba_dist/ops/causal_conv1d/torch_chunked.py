"""Causal convolution in plain PyTorch: K shifted multiply-adds over cache-sized tiles.

Each document is convolved on its own, so nothing can leak between documents. The forward keeps its
inputs only; the backward redoes the convolution of a tile, which is in the cache, where the SiLU
needs it.

R rows, T steps of a tile, E channels, K kernel width; tap j meets the input j steps back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_dist.ops.documents import Span, document_spans, reset_mask
from mamba_dist.ops.first_order import first_order
from mamba_dist.ops.precision import autocast_disabled, compute_dtype

# Elements of a (R, T, E) tile on CPU. B4 L512 E512 forward and backward, one core: 7.7 ms;
# 16.9 ms with an eighth of it (launches), 7.3 ms with twice as much.
_CPU_TILE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class _Tile:
    """Positions [start, stop) of a document that starts at `span.start`."""

    span: Span
    start: int
    stop: int

    @property
    def where(self) -> tuple[slice, slice]:
        return self.span.rows, slice(self.start, self.stop)

    def first_output(self, tap: int) -> int:
        """First position of the tile whose input `tap` steps back is in the document."""
        return min(self.stop, max(self.start, self.span.start + tap))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    silu: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output (B, L, E) in x's dtype and, if asked for, final state (B, E, K - 1) in fp32 or fp64.

    Arguments and shapes are those of `mamba_dist.ops.causal_conv1d.causal_conv1d`.
    """
    dtype = compute_dtype(x)
    with autocast_disabled(x):
        history = None if initial_state is None else initial_state.to(dtype).mT  # (B, K - 1, E)
        if x.shape[1] == 1:
            y = _single_step(x, weight, bias, history, silu)
        else:
            tiles = _tiles(document_spans(seq_idx, batch=x.shape[0], length=x.shape[1]), x)
            y = _CausalConv1d.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, history, tiles, silu
            )
        if not return_final_state:
            return y, None
        return y, _final_state(x, weight.shape[1], seq_idx, history)


def _tiles(spans: list[Span], x: Tensor) -> tuple[_Tile, ...]:
    def pieces() -> Iterator[_Tile]:
        for span in spans:
            steps = span.length
            if x.device.type == "cpu":
                rows = span.last_row - span.first_row
                steps = max(1, _CPU_TILE_ELEMENTS // (rows * x.shape[2]))
            for start in range(span.start, span.stop, steps):
                yield _Tile(span, start, min(start + steps, span.stop))

    return tuple(pieces())


def _single_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, silu: bool
) -> Tensor:
    """Decoding: one step in few launches, differentiated by autograd."""
    dtype = compute_dtype(x)
    taps = weight.to(dtype)
    y = x[:, 0].to(dtype) * taps[:, -1]
    if history is not None:
        y = y + (history.mT * taps[:, :-1]).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)[:, None]


def _final_state(x: Tensor, width: int, seq_idx: Tensor | None, history: Tensor | None) -> Tensor:
    """The last K - 1 inputs (B, E, K - 1), zero where they belong to an earlier document."""
    batch, length, channels = x.shape
    recent = x[:, max(0, length - width + 1) :].to(compute_dtype(x))
    if history is None:
        history = recent.new_zeros(batch, width - 1, channels)
    window = torch.cat([history[:, recent.shape[1] :], recent], dim=1)
    resets = reset_mask(seq_idx)
    if resets is not None:
        # Counted, not compared by id: an id may return after another document.
        document = F.pad(resets.cumsum(1), (width - 1, 0))
        foreign = document[:, length:] != document[:, -1:]
        window = window.masked_fill(foreign[..., None], 0.0)
    return window.mT.contiguous()


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        history: Tensor | None,
        tiles: tuple[_Tile, ...],
        silu: bool,
    ) -> Tensor:
        taps = _taps(x, weight)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for tile in tiles:
            out = _convolve(x, taps, bias, history, tile)
            y[tile.where] = F.silu(out, inplace=True) if silu else out
        ctx.save_for_backward(x, weight, bias, history)
        ctx.tiles, ctx.silu = tiles, silu
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, bias, history = ctx.saved_tensors
        with autocast_disabled(x):
            dtype = compute_dtype(x)
            taps = _taps(x, weight)
            grad_x = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            grad_taps = torch.zeros_like(taps)
            grad_bias = torch.zeros_like(taps[0])
            grad_history = None if history is None else torch.zeros_like(history)
            for tile in ctx.tiles:
                grad = grad_y[tile.where].to(dtype)
                if ctx.silu:
                    grad = _silu_backward(grad, _convolve(x, taps, bias, history, tile))
                grad_bias.add_(grad.sum((0, 1)))
                _tile_backward(x, taps, tile, grad, grad_x, grad_taps)
                if grad_history is not None:
                    assert history is not None
                    _history_backward(history, taps, tile, grad, grad_history, grad_taps)
            grad_weight = grad_taps.flip(0).t().to(weight.dtype)
            return (
                grad_x.to(x.dtype),
                grad_weight,
                None if bias is None else grad_bias.to(bias.dtype),
                grad_history,
                None,
                None,
            )


def _taps(x: Tensor, weight: Tensor) -> Tensor:
    """The weight (E, K) as contiguous rows (K, E), row j for the input j steps back."""
    return weight.to(compute_dtype(x)).t().flip(0).contiguous()


def _convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, history: Tensor | None, tile: _Tile
) -> Tensor:
    """The tile's output before the activation, (R, T, E)."""
    rows = tile.span.rows
    out = x[tile.where].to(taps.dtype) * taps[0]
    for tap in range(1, len(taps)):
        first = tile.first_output(tap)
        out[:, first - tile.start :].addcmul_(
            x[rows, first - tap : tile.stop - tap].to(taps.dtype), taps[tap]
        )
        if history is not None and tile.span.start == 0 and first > tile.start:
            inputs = _history_inputs(history, tile, tap, first)
            out[:, : first - tile.start].addcmul_(inputs, taps[tap])
    return out if bias is None else out.add_(bias.to(taps.dtype))


def _history_inputs(history: Tensor, tile: _Tile, tap: int, first: int) -> Tensor:
    """What the outputs of [tile.start, first) see `tap` steps back, which is before position 0."""
    offset = history.shape[1] - tap
    return history[tile.span.rows, tile.start + offset : first + offset]


def _silu_backward(grad: Tensor, value: Tensor) -> Tensor:
    gate = torch.sigmoid(value)
    slope = torch.addcmul(gate, value.mul_(gate), 1.0 - gate)  # s + v s (1 - s)
    return slope.mul_(grad)


def _tile_backward(
    x: Tensor, taps: Tensor, tile: _Tile, grad: Tensor, grad_x: Tensor, grad_taps: Tensor
) -> None:
    """Adds what the tile's outputs send back to the document's inputs and to the taps."""
    rows = tile.span.rows
    for tap in range(len(taps)):
        first = tile.first_output(tap)
        sent = grad[:, first - tile.start :]
        source = rows, slice(first - tap, tile.stop - tap)
        grad_x[source].addcmul_(sent, taps[tap])
        grad_taps[tap].add_((sent * x[source].to(taps.dtype)).sum((0, 1)))


def _history_backward(
    history: Tensor,
    taps: Tensor,
    tile: _Tile,
    grad: Tensor,
    grad_history: Tensor,
    grad_taps: Tensor,
) -> None:
    if tile.span.start != 0:
        return
    for tap in range(1, len(taps)):
        first = tile.first_output(tap)
        if first > tile.start:
            sent = grad[:, : first - tile.start]
            inputs = _history_inputs(history, tile, tap, first)
            grad_taps[tap].add_((sent * inputs).sum((0, 1)))
            _history_inputs(grad_history, tile, tap, first).addcmul_(sent, taps[tap])
