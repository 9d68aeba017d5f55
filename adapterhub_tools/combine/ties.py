"""TIES: trim each delta to its largest values, elect a sign for each element, average what has it.

Yadav et al. 2023, "TIES-Merging: resolving interference when merging models", arXiv:2306.01708, §3 and
algorithm 1: τ̂_t keeps the top k % of |τ_t|; γ = sgn(Σ_t τ̂_t); τ = mean of {τ̂_t : sgn(τ̂_t) = γ ≠ 0}.

Here τ_t is an adapter's true delta of one tensor times its weight; the paper trims over all tensors of a
model at once, PEFT and mergekit tensor by tensor, as here. Magnitudes equal to the k-th all stay. Where the
two sides are equal the paper's sgn is 0 and so is the result; PEFT and mergekit take the positive values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method
from adapterhub_tools.linalg.sign_election import SignElection
from adapterhub_tools.linalg.trimming import check_share, keep_between, thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties(Method):
    """The hyperparameters of TIES.

    Attributes:
        density: the share of each delta's values that stay, the paper's k / 100; in (0, 1].
        majority_sign: ``"total"`` elects by Σ τ̂_t, ``"frequency"`` by how many have each sign.
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.2
    majority_sign: str = "total"

    def __post_init__(self) -> None:
        """Refuses values that they cannot have."""
        check_share(self.density, "density")
        SignElection(self.majority_sign)

    def prepare(
        self,
        inputs: Sequence[DeltaInput],
        name: str,  # noqa: ARG002 - nothing is left to chance
    ) -> tuple[tuple[tuple[float, float], ...], SignElection]:
        """Returns the magnitudes that stay, exactly; see ElementWise."""
        limits = thresholds([item.delta for item in inputs], self.density)
        return limits, SignElection(self.majority_sign)

    def apply(
        self,
        state: tuple[tuple[tuple[float, float], ...], SignElection],
        deltas: list[Tensor],
        first: int,  # noqa: ARG002 - nothing depends on the place
    ) -> Tensor:
        """Returns some rows of the combined delta; see ElementWise."""
        limits, election = state
        keep_between(deltas, limits)
        return election.mean(deltas)


IMPLEMENTATION = Ties
