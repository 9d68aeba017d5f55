"""The sum of deltas of which each keeps only its largest values.

Σ_t τ̂_t, with τ̂_t the top share of |τ_t|: task arithmetic (Ilharco et al. 2022, arXiv:2212.04089, §2) of the
trimmed deltas of TIES (Yadav et al. 2023, arXiv:2306.01708, §3, step 1), without its election; PEFT's
``magnitude_prune``. Magnitudes equal to the k-th all stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method
from adapterhub_tools.linalg.combined_rows import added
from adapterhub_tools.linalg.trimming import check_share, keep_between, thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudePrune(Method):
    """The hyperparameter of magnitude pruning.

    Attributes:
        density: the share of each delta's values that stay; in (0, 1].
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.5

    def __post_init__(self) -> None:
        """Refuses values that it cannot have."""
        check_share(self.density, "density")

    def prepare(
        self,
        inputs: Sequence[DeltaInput],
        name: str,  # noqa: ARG002 - nothing is left to chance
    ) -> tuple[tuple[float, float], ...]:
        """Returns the magnitudes that stay, exactly; see ElementWise."""
        return thresholds([item.delta for item in inputs], self.density)

    def apply(
        self,
        state: tuple[tuple[float, float], ...],
        deltas: list[Tensor],
        first: int,  # noqa: ARG002 - nothing depends on the place
    ) -> Tensor:
        """Returns some rows of the combined delta; see ElementWise."""
        keep_between(deltas, state)
        return added(deltas)


IMPLEMENTATION = MagnitudePrune
