"""HiRA: W' = W + W ⊙ (B·A), a delta of high rank from two factors.

Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models"
(ICLR), eq. 5; peft/tuners/hira/layer.py, ``get_delta_weight``. There is no scaling, so the rank does not
enter; PEFT 0.21 leaves the config's ``rank_pattern`` aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.factors import low_rank
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import wrong_factor
from adapterhub_tools.model.product_shape import check_product
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression


@dataclass(frozen=True, slots=True, kw_only=True)
class HiRA:
    """The hyperparameters of one HiRA module.

    Attributes:
        multiplier: the caller's factor m on the change: W + m·W⊙(B·A).
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> HiRA:
        """Reads the hyperparameters of a target module; the rank is that of the factors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"A"`` (rank, in, …) and ``"B"`` (out, rank, …).
            kind: the module's kind, see model/adapter.py.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        a, b = factors.get("A"), factors.get("B")
        if a is None or b is None:
            return (wrong_factor(module, next(iter(factors.values())), "both A and B"),)
        if min(len(a.shape), len(b.shape)) < 2 or a.shape[0] != b.shape[1]:
            return (wrong_factor(module, a, f"the rank of B, {list(b.shape)}"),)
        return check_product(a, b, kind, base, module)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Expression:
        """Returns W ⊙ (1 + m·B·A) in the stored layout.

        Shapes: A (rank, in, …) and B (out, rank, …) give (out, in·…); for ``conv1d`` and ``embedding``,
        which are stored transposed, (in, out).
        Dtype:  any float in; rounded once.
        Memory: 8 bytes per value of the factors, and one block of gains.
        """
        from adapterhub_tools.linalg.gain import Gain

        scale = Surd(coefficient=Fraction(self.multiplier))
        return Gain(low_rank(factors["A"], factors["B"], weight, scale), Fraction(1), weight.rows)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Expression:
        """Returns W' / (1 + m·B·A), the weight before the merge, in float64.

        Raises:
            LossyError: while it is evaluated, where a gain is 0.
        """
        from adapterhub_tools.linalg.gain import quotient

        scale = Surd(coefficient=Fraction(self.multiplier))
        return quotient(low_rank(factors["A"], factors["B"], weight, scale), Fraction(1), weight.rows)


IMPLEMENTATION = HiRA
