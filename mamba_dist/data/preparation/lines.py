"""The lines that begin in a range of a stream of bytes, in bounded memory however long they are."""

from collections.abc import Iterator


def lines_of(blocks: Iterator[bytes], *, most_bytes: int) -> Iterator[bytes | None]:
    """Every line without its line feed, None for one longer than `most_bytes`."""
    return _lines(blocks, begin=0, stop=None, most_bytes=most_bytes)


def lines_beginning_in(
    blocks: Iterator[bytes], *, start: int, stop: int, most_bytes: int
) -> Iterator[bytes | None]:
    """The lines that begin at bytes start..stop-1, None for one longer than `most_bytes`.

    `blocks` are the bytes from start - 1 on, if `start` is not 0: a line feed there means that a
    line begins at `start`.
    """
    if start >= stop:
        return
    if start == 0:
        yield from _lines(blocks, begin=0, stop=stop, most_bytes=most_bytes)
        return
    at = start - 1
    for block in blocks:
        found = block.find(b"\n")
        if found >= 0:
            begin = at + found + 1
            if begin < stop:
                rest = _chained(block[found + 1 :], blocks)
                yield from _lines(rest, begin=begin, stop=stop, most_bytes=most_bytes)
            return
        at += len(block)
        if at >= stop:
            return


def _chained(first: bytes, others: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from others


def _lines(
    blocks: Iterator[bytes], *, begin: int, stop: int | None, most_bytes: int
) -> Iterator[bytes | None]:
    """`begin` is where the blocks, and with them a line, begin."""
    pending: list[bytes] = []
    size = 0
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        size += len(first)
        for line in others:
            yield b"".join(pending) if size <= most_bytes else None
            begin += size + 1
            if stop is not None and begin >= stop:
                return
            pending, size = [line], len(line)
        if size > most_bytes:
            pending.clear()
            if stop is not None and begin + size >= stop:
                break  # wherever it ends, no other line begins in the range
    if stop is None or begin < stop:
        yield b"".join(pending) if size <= most_bytes else None
