"""The order of samples as a pure function: position → (epoch, window), in O(1), without an index.

A keyed Feistel network (Luby and Rackoff 1988) permutes the smallest domain of 4^k that holds all
windows; results outside are fed back until they fall inside ("cycle-walking", Black and Rogaway
2002, at most 4 rounds on average). A bijection visits every window exactly once per epoch, by
construction.
"""

import hashlib
from dataclasses import dataclass

_ROUNDS = 8
_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class SampleOrder:
    """The endless sequence of windows that a run reads of one data set, one epoch after another.

    Positions count that data set's samples from the beginning of the run. With `shuffle`, each
    epoch has an order of its own that depends on the seed and on `key`, which tells the data sets
    of a mixture apart; without, every epoch goes through the windows from 0 up.
    """

    windows: int
    seed: int
    shuffle: bool = True
    key: str = ""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"{self.windows} windows cannot be ordered")

    def locate(self, position: int) -> tuple[int, int]:
        """The epoch, from 0, and the window in it that stand at a position."""
        if position < 0:
            raise ValueError(f"position {position} is before the beginning of the run")
        epoch, index = divmod(position, self.windows)
        if not self.shuffle:
            return epoch, index
        return epoch, _permute(index, self.windows, keys=_round_keys(self.seed, epoch, self.key))


def _round_keys(seed: int, epoch: int, key: str) -> list[int]:
    text = f"mamba-dist order {seed} {epoch} {key}".rstrip()
    digest = hashlib.blake2b(text.encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]


def _permute(index: int, count: int, *, keys: list[int]) -> int:
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half_bits, keys)
        if index < count:
            return index


def _feistel(index: int, half_bits: int, keys: list[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(value: int) -> int:
    # Finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output
    # bit.
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
