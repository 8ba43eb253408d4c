"""The copy that a save is written from, and the memory that it may take."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from written_checkpoint import fragments_of, state_of

from mamba_dist.checkpoint.host_copy import HostCopy, copy_bytes, state_bytes
from mamba_dist.engine.base import STATE_KINDS, Fragment


def test_an_update_waits_until_the_state_is_copied() -> None:
    state = state_of(1)
    copy = HostCopy(fragments_of(1, state=state))
    for _ in range(2):
        before = {n: {k: t.clone() for k, t in kinds.items()} for n, kinds in state.items()}
        copies = copy.begin(fragments_of(1, state=state))
        update = threading.Thread(target=copy.hold_updates)
        update.start()
        update.join(0.1)
        assert update.is_alive()
        copy.complete()
        update.join(10)
        assert not update.is_alive()
        for kinds in state.values():
            for tensor in kinds.values():
                tensor.add_(1)
        for one in copies:
            for kind in STATE_KINDS:
                assert torch.equal(one.tensor(kind), before[one.name][kind].flatten())


@pytest.mark.gpu
def test_on_a_device_the_copy_is_of_what_was_there_and_holds_up_the_update_alone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numel = 1 << 26
    # A rank's device is its own, and the memory is taken on a thread that knows nothing of it.
    torch.cuda.set_device(torch.cuda.device_count() - 1)
    live = torch.zeros(3, numel, device="cuda")
    fragments = [Fragment("p", (numel,), 0, *live)]
    with ThreadPoolExecutor(1) as threads:
        copy = threads.submit(HostCopy, fragments).result()
    for value in range(3):
        # What is still to be computed when the copy is asked for belongs to it.
        torch.cuda._sleep(100_000_000)
        live.fill_(value)
        [copied] = copy.begin(fragments)
        copy.hold_updates()
        live.fill_(-1)
        copy.complete()
        assert copied.master.is_pinned()
        for kind in STATE_KINDS:
            assert bool((copied.tensor(kind) == value).all())


def test_the_stream_of_the_copy_is_on_the_device_of_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is taken on a thread, which CUDA lets begin on device 0, also on ranks of others."""
    entered: list[torch.device] = []
    asked: list[torch.device] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "Stream", asked.append)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, *, dtype, pin_memory: plain(size, dtype=dtype))
    second = torch.device("cuda", 1)
    live = SimpleNamespace(is_cuda=True, device=second, numel=lambda: 4)
    HostCopy([Fragment("p", (4,), 0, live, live, live)])  # type: ignore[arg-type]
    assert asked == entered == [second]


def test_pinned_memory_is_counted_as_large_as_torch_takes_it() -> None:
    assert copy_bytes(fragments_of(1)) == state_bytes(fragments_of(1))

    def pinned(numel: int) -> int:
        one = SimpleNamespace(is_cuda=True, numel=lambda: numel)
        return copy_bytes([Fragment("p", (numel,), 0, one, one, one)])  # type: ignore[arg-type]

    assert [pinned(1 << 30), pinned((1 << 30) // 3)] == [16 << 30, 4 << 30]
    assert state_bytes(fragments_of(1)) == 3 * 4 * (15 + 7 + 1)
