"""Decoding steps as CUDA graphs: recorded once, then launched as a whole for every token.

One token of a small model is a thousand kernels of a few microseconds each, which a GPU finishes
sooner than Python can ask for them. A graph holds addresses and not values, so everything that
changes from token to token lives in buffers that stay where they are.

The model's path of one token can be recorded; prompts are read outside.

B texts, V vocabulary with padding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from mamba_dist.errors import BackendError
from mamba_dist.model.lm import MambaLM
from mamba_dist.model.state import LayerState
from mamba_dist.ops.cuda_graph import CudaRecorder

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""From a computation on fixed buffers of a device to one that repeats it on what they hold then."""

_WITHOUT: Final = "decode without one by --no-graph, or GenerationSettings(graph=False)"


def cuda_graph(compute: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The replay of what `compute` launches on the CUDA device `device`; runs it first, unrecorded.

    Raises:
        BackendError: it does something that a graph cannot hold, or the device knows no graphs.
    """
    if device.type != "cuda":
        raise BackendError(
            f"CUDA graphs need a CUDA device, and the model is on {device}; {_WITHOUT}"
        )
    try:
        recorder = CudaRecorder(device)
        recorder.warm_up(compute)
        return recorder.record(compute)
    # What CUDA refuses while it records arrives as RuntimeError.
    except RuntimeError as error:
        raise BackendError(
            f"a decoding step cannot be captured as a CUDA graph ({error}); {_WITHOUT}"
        ) from error


class DecodingStep:
    """One token of B texts: reads and replaces the states that it holds.

    Made for the shapes and dtypes of `states`, whose values it starts from. The model's parameters
    must stay where they are in memory; their values may change. It may be made and used inside of
    `torch.inference_mode()` as well as outside, in any order.

    Raises:
        BackendError: the step cannot be captured.
    """

    def __init__(
        self, model: MambaLM, states: Sequence[LayerState], *, capture: Capture = cuda_graph
    ) -> None:
        device = states[0].conv.device
        self._model = model
        with _plain_tensors():
            self._tokens = torch.zeros(len(states[0].conv), 1, dtype=torch.int64, device=device)
            self._states = [LayerState(s.conv.clone(), s.ssm.clone()) for s in states]
        self._logits: Tensor
        self._replay = capture(self._compute, device)
        # Capturing has run the step and moved them.
        self.load(states)

    @torch.no_grad()
    def load(self, states: Sequence[LayerState]) -> None:
        """Starts again from `states`, which are copied."""
        torch._foreach_copy_(_parts(self._states), _parts(states))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after the next token of each text, valid until the next call.

        tokens: (B,) int64, on any device.
        """
        self._tokens.copy_(tokens[:, None])
        self._replay()
        return self._logits

    def _compute(self) -> None:
        kind = self._tokens.device.type
        # Weights that autocast has rounded would be freed at its end, under the graph's feet.
        autocast = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with _plain_tensors(), autocast:
            logits, states = self._model.forward_with_state(
                self._tokens, self._states, last_only=True, donate_states=True
            )
            self._logits = logits[:, -1]
            _replace(_parts(self._states), _parts(states))


class DecodingSteps:
    """The captured steps of one model, kept for the next texts: one for each batch and precision.

    Give it to `generate` or `stream` to capture once for many calls. Texts that grow at the same
    time get steps of their own.
    """

    def __init__(self, model: MambaLM, *, capture: Capture = cuda_graph) -> None:
        self.model = model
        self._capture = capture
        self._idle: defaultdict[object, list[DecodingStep]] = defaultdict(list)

    @contextmanager
    def begun(self, states: Sequence[LayerState]) -> Iterator[DecodingStep]:
        """A step that nobody else uses until the context ends, starting from `states`.

        Raises:
            BackendError: the step cannot be captured.
        """
        idle = self._idle[self._key(states)]
        if idle:
            step = idle.pop()
            step.load(states)
        else:
            step = DecodingStep(self.model, states, capture=self._capture)
        try:
            yield step
        finally:
            idle.append(step)

    def _key(self, states: Sequence[LayerState]) -> object:
        """What a captured step is fixed to."""
        weight, state = self.model.backbone.embedding.weight, states[0].conv
        kind = state.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # The address, since parameters that were moved leave a graph with the memory they had.
        return len(state), state.device, weight.dtype, weight.data_ptr(), autocast


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Context whose tensors are no inference tensors, which nobody may write to outside that mode.

    Buffers outlive the mode in which they happen to be made.
    """
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


def _replace(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Copies what is not in its place yet: kernels of our own write the new state over the old."""
    elsewhere = [(to, value) for to, value in zip(old, new, strict=True) if to is not value]
    if elsewhere:
        # One launch for many tensors, where a copy each would cost as much as a layer.
        torch._foreach_copy_([to for to, _ in elsewhere], [value for _, value in elsewhere])


def _parts(states: Sequence[LayerState]) -> list[Tensor]:
    return [part for state in states for part in (state.conv, state.ssm)]
