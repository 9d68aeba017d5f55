"""Random numbers by counter: the number of an element depends on its place, never on what was drawn before.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.3) as numpy has it,
whose stream numpy keeps from release to release (NEP 19). Element e takes the 32 bits at place e of the
stream of a key, so that neither blocks of rows nor threads change it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_PER_COUNTER = 8
"""32-bit numbers of one counter value: four words of 64 bits."""
_DOMAIN = b"adaptertool:combine-random-v1\0"


def stream_key(seed: int, owner: bytes, name: str) -> int:
    """Returns the 128-bit key of the stream of one tensor of one owner.

    The first 16 bytes, little-endian, of SHA-256 over a domain, the seed (8 bytes, little-endian), and owner
    and name (UTF-8), each after its length (8 bytes, little-endian).

    Args:
        seed: at least 0, below 2^64.
        owner: whose tensor it is, for example the digest of an adapter.
        name: the tensor.
    """
    text = name.encode("utf-8")
    data = _DOMAIN + seed.to_bytes(8, "little")
    for part in (owner, text):
        data += len(part).to_bytes(8, "little") + part
    return int.from_bytes(hashlib.sha256(data).digest()[:16], "little")


def random_bits(key: int, first: int, count: int) -> npt.NDArray[np.uint32]:
    """Returns the uniform 32-bit numbers of some consecutive elements.

    Args:
        key: of the stream.
        first: the first element.
        count: how many.
    """
    start, skip = divmod(first, _PER_COUNTER)
    counters = -(-(skip + count) // _PER_COUNTER)
    words = np.random.Philox(key=key, counter=start).random_raw(4 * counters)
    return words.astype("<u8", copy=False).view("<u4")[skip : skip + count]


def check_seed(seed: object) -> int:
    """Returns a seed.

    Raises:
        ValueError: it is no integer from 0 to 2^64 − 1.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}")
    return seed
