"""Random choices that are functions of their arguments, so they are equal on every host.

Nothing here has a state. A reader that knows how many records it drew knows the next one, so its
state is a few counts.
"""

import functools
import hashlib
from collections.abc import Mapping

from grain import experimental as grain


def stable_hash(*parts: str | int) -> int:
    """Return 64 bits that look random and depend on the parts' text alone.

    Python's own `hash` of text differs between processes. NumPy's `Generator` may give other
    numbers in another version of NumPy.
    """
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def shuffle_position(position: int, num_records: int, seed: int, name: str, epoch: int) -> int:
    """Return the number of the record at a position of a source's shuffled order in an epoch.

    The order is a permutation by a block cipher on the position. It is computed for one position at
    a time, so it needs no memory, whatever the number of records.
    """
    epoch_seed = _hash_epoch(seed, name, epoch)
    return grain.index_shuffle(position, max_index=num_records - 1, seed=epoch_seed, rounds=4)


# Kept, because each record of an epoch asks for the same one.
@functools.lru_cache(maxsize=256)
def _hash_epoch(seed: int, name: str, epoch: int) -> int:
    return stable_hash(seed, name, epoch) % 2**32  # grain takes seeds of 32 bits


def choose_by_weight(weights: Mapping[str, float], total: float, *key: str | int) -> str:
    """Return a name, with the probability of its weight over `total`.

    Args:
      weights: weight of each name, above 0.
      total: sum of the weights. The caller adds them up, because the order of adding decides the
        last bit.
      key: arguments that decide the choice, such as a seed and a count.
    """
    point = stable_hash(*key) / 2**64 * total
    for name, weight in weights.items():
        point -= weight
        if point < 0:
            return name
    return list(weights)[-1]  # rounding put the point at the very end of the last interval
