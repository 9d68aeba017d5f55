"""DARE with the election of TIES: drop at random and rescale, then average what has the elected sign.

Yu et al. 2023, arXiv:2311.03099, §3.2 (δ̂ = (1 − m) ⊙ δ / (1 − p), m ~ Bernoulli(p)), in place of the trimming
of Yadav et al. 2023, arXiv:2306.01708, §3; the density is 1 − p. The drops of an element depend on the seed,
its adapter, its tensor and its place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method
from adapterhub_tools.linalg.counter_random import check_seed, stream_key
from adapterhub_tools.linalg.sign_election import SignElection
from adapterhub_tools.linalg.trimming import check_share, keep_by_chance

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class DareTies(Method):
    """The hyperparameters of DARE with an election.

    Attributes:
        density: the probability that a value stays, 1 − p of the paper; in (0, 1].
        majority_sign: ``"total"`` elects by the sum, ``"frequency"`` by how many have each sign.
        seed: of the random numbers; from 0 to 2^64 − 1.
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.5
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that they cannot have."""
        check_share(self.density, "density")
        SignElection(self.majority_sign)
        check_seed(self.seed)

    def prepare(self, inputs: Sequence[DeltaInput], name: str) -> tuple[tuple[int, ...], SignElection]:
        """Returns the key of each delta's random numbers; see ElementWise."""
        keys = tuple(stream_key(self.seed, item.key, name) for item in inputs)
        return keys, SignElection(self.majority_sign)

    def apply(self, state: tuple[tuple[int, ...], SignElection], deltas: list[Tensor], first: int) -> Tensor:
        """Returns some rows of the combined delta; see ElementWise."""
        keys, election = state
        for delta, key in zip(deltas, keys, strict=True):
            keep_by_chance(delta, float(self.density), key, first)
        return election.mean(deltas)


IMPLEMENTATION = DareTies
