"""DARE: drop values of each delta at random, rescale the others, add up.

Yu et al. 2023, "Language models are Super Mario: absorbing abilities from homologous models as a free lunch",
arXiv:2311.03099, §3.2 (drop and rescale): m ~ Bernoulli(p), δ̂ = (1 − m) ⊙ δ / (1 − p); here 1 − p is the
density. The drops of an element depend on the seed, its adapter, its tensor and its place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method
from adapterhub_tools.linalg.combined_rows import added
from adapterhub_tools.linalg.counter_random import check_seed, stream_key
from adapterhub_tools.linalg.trimming import check_share, keep_by_chance

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class DareLinear(Method):
    """The hyperparameters of DARE with a sum.

    Attributes:
        density: the probability that a value stays, 1 − p of the paper; in (0, 1].
        seed: of the random numbers; from 0 to 2^64 − 1.
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that they cannot have."""
        check_share(self.density, "density")
        check_seed(self.seed)

    def prepare(self, inputs: Sequence[DeltaInput], name: str) -> tuple[int, ...]:
        """Returns the key of each delta's random numbers; see ElementWise."""
        return tuple(stream_key(self.seed, item.key, name) for item in inputs)

    def apply(self, state: tuple[int, ...], deltas: list[Tensor], first: int) -> Tensor:
        """Returns some rows of the combined delta; see ElementWise."""
        for delta, key in zip(deltas, state, strict=True):
            keep_by_chance(delta, float(self.density), key, first)
        return added(deltas)


IMPLEMENTATION = DareLinear
