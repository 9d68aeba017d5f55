"""Spherical interpolation of two deltas, tensor by tensor.

Shoemake 1985, "Animating rotation with quaternion curves", §3.3, for vectors of any length as in mergekit's
``slerp``: sin((1 − t)·θ)/sin θ·ΔW₁ + sin(t·θ)/sin θ·ΔW₂, with θ the angle between the two flattened deltas
and t = w₂/(w₁ + w₂). Nearly parallel or opposite deltas (|cos θ| > 0.9995), and a delta that is zero, are
interpolated linearly: (1 − t)·ΔW₁ + t·ΔW₂.

θ needs inner products alone, so that factored deltas stay factored and the result is exact but for the two
coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import TYPE_CHECKING, ClassVar

from adapterhub_tools.combine._method import Method

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995
"""|cos θ| above which the interpolation is linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slerp(Method):
    """Spherical interpolation; it has no hyperparameters but the two weights."""

    kind: ClassVar[str] = "factored"
    default_rank: ClassVar[str] = "exact"
    shares_factors: ClassVar[bool] = False
    needs_angles: ClassVar[bool] = True

    def check(self, count: int) -> None:
        """Refuses any number of adapters but two.

        Raises:
            ValueError: there are not two.
        """
        if count != 2:
            raise ValueError(f"slerp interpolates between two adapters; {count} were given")

    def check_weights(self, weights: tuple[float, ...]) -> None:
        """Refuses weights that name no point between two adapters.

        Raises:
            ValueError: one is negative, or both are 0.
        """
        first, second = weights
        if first < 0 or second < 0 or first + second == 0:
            raise ValueError(
                "the weights of slerp say how far to go from one adapter to the other; they must be at least "
                f"0 and not both 0: {first:g} and {second:g}"
            )

    def coefficients(self, weights: tuple[float, ...], inner: Callable[[], Tensor]) -> tuple[float, ...]:
        """Returns c with ΔW = c₁·ΔW₁ + c₂·ΔW₂.

        Args:
            weights: w₁ and w₂, see ``check_weights``.
            inner: gives the inner products of the two deltas, without their weights, shape (2, 2).

        Raises:
            ValueError: the weights are no such.
        """
        self.check_weights(weights)
        first, second = weights
        t = second / (first + second)
        gram = inner()
        norms = sqrt(float(gram[0, 0])) * sqrt(float(gram[1, 1]))
        cosine = float(gram[0, 1]) / norms if norms > 0 else 1.0
        if abs(cosine) > PARALLEL:
            return 1 - t, t
        angle = acos(cosine)
        return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


IMPLEMENTATION = Slerp
