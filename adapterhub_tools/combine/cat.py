"""The weighted sum of deltas, with the factors of all inputs one beside the other: ranks add up.

ΔW = Σ w_i·s_i·B_i·A_i = [k_1·B_1, …, k_n·B_n]·[A_1; …; A_n]·s with k_i = w_i·s_i/s. PEFT has it by this name
(peft/tuners/lora/model.py, ``add_weighted_adapter``); here the scales are those that act, rsLoRA's included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cat:
    """The concatenation; it has no hyperparameters."""

    kind: ClassVar[str] = "factored"
    default_rank: ClassVar[str] = "exact"
    shares_factors: ClassVar[bool] = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Cat:
        """Makes the method of its options; it has none."""
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """Returns the hyperparameters, for receipts."""
        return {}

    def check(self, count: int) -> None:
        """Accepts any number of adapters, at least one."""
        if count < 1:
            raise ValueError("there is nothing to combine")

    def coefficients(
        self,
        weights: tuple[float, ...],
        inner: Callable[[], Tensor],  # noqa: ARG002 - a sum needs no angles
    ) -> tuple[float, ...]:
        """Returns c with ΔW = Σ c_i·ΔW_i: the weights."""
        return weights


IMPLEMENTATION = Cat
