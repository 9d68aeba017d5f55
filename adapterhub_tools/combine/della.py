"""DELLA: drop small values more often than large ones, rescale, and average what has the elected sign.

Deep, Bhardwaj & Poria 2024, "DELLA-Merging: reducing interference in model merging through magnitude-based
sampling", arXiv:2406.11617, §3: MAGPRUNE ranks the n values of a row by magnitude and drops the one of rank r
with a probability that falls linearly with r over [p − ε/2, p + ε/2]; what stays is divided by 1 − p_r; then
the elect and fuse steps of TIES. Here 1 − p is the density, and the value of rank r (0 for the smallest)
stays with q_r = density + ε·((r + ½)/n − ½), so that the mean of q is the density; equal magnitudes are
ranked by column.

mergekit's ``della`` takes ε on either side (twice the width) and rescales by the sum of magnitudes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from adapterhub_tools.combine._method import Method
from adapterhub_tools.linalg.counter_random import check_seed, stream_key
from adapterhub_tools.linalg.row_order import ascending
from adapterhub_tools.linalg.sign_election import SignElection
from adapterhub_tools.linalg.trimming import check_share, keep_by_chance

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Della(Method):
    """The hyperparameters of DELLA.

    Attributes:
        density: the mean probability that a value stays, 1 − p of the paper; in (0, 1].
        epsilon: the width of the range of probabilities; [density − ε/2, density + ε/2] lies within [0, 1].
        majority_sign: ``"total"`` elects by the sum, ``"frequency"`` by how many have each sign.
        seed: of the random numbers; from 0 to 2^64 − 1.
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.5
    epsilon: float = 0.2
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that they cannot have."""
        check_share(self.density, "density")
        check_share(self.epsilon, "epsilon", zero=True)
        if self.density - self.epsilon / 2 < 0 or self.density + self.epsilon / 2 > 1:
            raise ValueError(
                f"density ± epsilon/2 must lie within [0, 1]: {self.density} ± {self.epsilon / 2} does not"
            )
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
            keep_by_chance(delta, self._probabilities(delta), key, first)
        return election.mean(deltas)

    def _probabilities(self, delta: Tensor) -> Tensor:
        """Returns q_r for every value of some rows."""
        columns = int(delta.shape[1])
        steps = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns - 0.5
        levels = (steps * self.epsilon + self.density).expand(delta.shape)
        return torch.empty_like(delta).scatter_(1, ascending(delta.abs()), levels)


IMPLEMENTATION = Della
