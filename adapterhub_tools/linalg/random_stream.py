"""Random tensors that adapters do not store, made again from their seed as PEFT makes them.

Both use the CPU generator of torch (Mersenne Twister), whose uniform numbers and permutations have been the
same in every release since 1.0; normal ones depend on the processor's vector width and are not used here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

_LONG = (2**32 - 1) // 20
"""From this length on, torch.randperm works in another way (aten/src/ATen/native/TensorFactories.cpp)."""


def seeded(seed: int) -> torch.Generator:
    """Returns a CPU generator that starts from a seed."""
    return torch.Generator(device="cpu").manual_seed(seed)


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns float32 numbers uniform in ±√3·√2/√fan_in, fan_in being the second axis (He et al. 2015).

    Args:
        shape: (rows, columns).
        generator: advanced by rows · columns numbers.
    """
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def permutation_head(total: int, count: int, seed: int) -> Tensor:
    """Returns ``torch.randperm(total, generator=seeded(seed))[:count]`` in memory of order ``count``.

    randperm shuffles forward (Fisher-Yates), so its first entries depend on the first draws alone. Whether
    this release of torch still does so is checked once; if not, the whole permutation is made.

    Args:
        total: length of the permutation.
        count: how many entries, at most ``total``.
        seed: of the generator.
    """
    if total >= _LONG or not _draws_known():
        return torch.randperm(total, generator=seeded(seed))[:count].clone()
    return _head(total, count, seed)


def _head(total: int, count: int, seed: int) -> Tensor:
    # Two draws of 32 bits make one of 64, the first one above.
    steps = min(count, total - 1)
    wide = torch.empty(steps // 2 + 1, dtype=torch.int64)
    wide.random_(-(2**63), None, generator=seeded(seed))
    draws = torch.stack(((wide >> 32) & 0xFFFFFFFF, wide & 0xFFFFFFFF), dim=1).flatten().tolist()
    moved: dict[int, int] = {}
    head = []
    for i in range(steps):
        other = i + draws[i] % (total - i)
        head.append(moved.get(other, other))
        moved[other] = moved.pop(i, i)
    if count > steps:
        head.append(moved.get(steps, steps))
    return torch.tensor(head, dtype=torch.int64)


@lru_cache(maxsize=1)
def _draws_known() -> bool:
    """Says whether permutations of this torch can be made draw by draw."""
    return all(
        torch.equal(_head(n, n, seed), torch.randperm(n, generator=seeded(seed)))
        for n, seed in ((1, 3), (97, 777), (1000, 0), (70001, 2**40 + 5))
    )


def check_seed(seed: object, field: str) -> int:
    """Returns a seed as it stands in a config.

    Raises:
        UnsupportedError: it is no integer that a generator takes.
    """
    if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64:
        return seed
    raise UnsupportedError.of(
        "seed",
        f"{field} is {seed!r}; random tensors that are not stored need an integer to be made again.",
        loc=field,
        remedy="Load the adapter with PEFT where it was trained and save it with the random tensors.",
    )
