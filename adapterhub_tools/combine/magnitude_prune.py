"""The sum of deltas of which each keeps only its largest values.

Σ_t τ̂_t, with τ̂_t the top share of |τ_t|: task arithmetic (Ilharco et al. 2022, arXiv:2212.04089, §2) of the
trimmed deltas of TIES (Yadav et al. 2023, arXiv:2306.01708, §3, step 1), without its election; PEFT's
``magnitude_prune``. Magnitudes equal to the k-th all stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.linalg.combined_rows import added
from adapterhub_tools.linalg.trimming import check_share, keep_between, thresholds

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import DeltaInput


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudePrune:
    """The hyperparameter of magnitude pruning.

    Attributes:
        density: the share of each delta's values that stay; in (0, 1].
    """

    kind: ClassVar[str] = "elementwise"
    density: float = 0.5

    def __post_init__(self) -> None:
        """Refuses values that it cannot have."""
        check_share(self.density, "density")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MagnitudePrune:
        """Makes it of options by name; a ValueError tells of wrong ones."""
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """Returns the hyperparameters."""
        return asdict(self)

    def check(self, count: int) -> None:
        """Accepts any number of adapters."""

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
        for delta, (low, high) in zip(deltas, state, strict=True):
            keep_between(delta, low, high)
        return added(deltas)


IMPLEMENTATION = MagnitudePrune
