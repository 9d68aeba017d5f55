"""BEFT: b' = b + v: only biases change.

Source: peft/tuners/beft/layer.py, ``Linear.merge``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class BEFT:
    """A BEFT module.

    Attributes:
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    needs_bias: ClassVar[bool] = True
    bias_only: ClassVar[bool] = True
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> BEFT:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def bias_roles(
        self,
        factors: Mapping[str, TensorSpec],
        kind: str,  # noqa: ARG002 - part of what a method may tell apart
    ) -> tuple[str, ...]:
        """Returns the factors that act on the bias: all."""
        return tuple(factors)

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the vector's length with the bias's.

        Args:
            factors: ``"bias"`` v, (1, out).
            kind: ``"linear"``, where only the number of outputs counts, or ``"bias"``.
            base: the base weight, or the bias, as stored.
            module: the module's path, for the message.
        """
        if kind not in ("linear", "bias"):
            return (wrong_kind(module, kind, ("linear",)),)
        vector = factors["bias"]
        if len(vector.shape) != 2 or vector.shape[0] != 1:
            return (wrong_factor(module, vector, "[1, out]"),)
        return misfit(module, base, (vector.shape[1], *base.shape[1:]))

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta v of a bias, as a column.

        Shapes: v (1, out) gives (out, 1).
        """
        from adapterhub_tools.linalg.low_rank import LowRankTerm

        left = factors["bias"].double().reshape(-1, 1)
        return LowRankTerm(
            left=left,
            right=left.new_ones(1, 1),
            scale=scaling_of(1.0, 1, "alpha", self.multiplier),
            exact_products=factors["bias"].element_size() <= 4,
            row=weight.row,
            column=weight.column,
        )


IMPLEMENTATION = BEFT
