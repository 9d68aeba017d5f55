"""Model Breadcrumbs: drop the largest and the smallest values of each delta, add up the rest.

Davari & Belilovsky 2023, "Model Breadcrumbs: scaling multi-task model merging with sparse masks",
arXiv:2312.06795, §3: Σ_t m_t ⊙ τ_t, where m_t is 0 for the top share γ and for the bottom share of |τ_t|,
layer by layer. mergekit's ``breadcrumbs`` names the shares as here. Magnitudes equal to a limit stay.
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
class Breadcrumbs(Method):
    """The hyperparameters of Model Breadcrumbs.

    Attributes:
        density: the share of each delta's values that stay; in (0, 1].
        gamma: the share of the largest ones that go first; in [0, 1), and at most 1 − density.
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.9
    gamma: float = 0.01

    def __post_init__(self) -> None:
        """Refuses values that they cannot have."""
        check_share(self.density, "density")
        check_share(self.gamma, "gamma", zero=True)
        if self.density + self.gamma > 1.0 + 1e-12:
            raise ValueError(
                f"density and gamma may not exceed 1 together: {self.density} stay and {self.gamma} go"
            )

    def prepare(
        self,
        inputs: Sequence[DeltaInput],
        name: str,  # noqa: ARG002 - nothing is left to chance
    ) -> tuple[tuple[float, float], ...]:
        """Returns the magnitudes that stay, exactly; see ElementWise."""
        return thresholds([item.delta for item in inputs], self.density, self.gamma)

    def apply(
        self,
        state: tuple[tuple[float, float], ...],
        deltas: list[Tensor],
        first: int,  # noqa: ARG002 - nothing depends on the place
    ) -> Tensor:
        """Returns some rows of the combined delta; see ElementWise."""
        keep_between(deltas, state)
        return added(deltas)


IMPLEMENTATION = Breadcrumbs
