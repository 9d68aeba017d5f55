"""DeLoRA: W' = W + (λ / r)·B·diag(1 / (‖aᵢ‖·‖bᵢ‖))·A·diag(c), c the column norms of the base at the start.

Source: Bini et al. 2025, arXiv:2503.18225; peft/tuners/delora/layer.py, ``_compute_delta``, which keeps the
norms at 10⁻⁴ or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm

_SMALLEST_NORM = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeLoRA:
    """A DeLoRA module; rank, λ and c are those of the tensors.

    The relative error of each of the r products is at most (in + out + 8)·2⁻⁵³: that of the norms.

    Attributes:
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> DeLoRA:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"A"`` (rank, in), ``"B"`` (out, rank), ``"lambda"`` (1,) and ``"w_norm"`` (in,).
            kind: ``"linear"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        if kind != "linear":
            return (wrong_kind(module, kind, ("linear",)),)
        a, b = factors["A"], factors["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            return (wrong_factor(module, b, f"[out, {a.shape[0] if a.shape else 'rank'}]"),)
        norms = factors.get("w_norm")
        if norms is None:
            return (wrong_factor(module, a, "delora_w_norm beside it; PEFT saves it since 0.18"),)
        if norms.shape != (a.shape[1],):
            return (wrong_factor(module, norms, f"[{a.shape[1]}]"),)
        if factors["lambda"].elements != 1:
            return (wrong_factor(module, factors["lambda"], "one value"),)
        return misfit_matrix(module, base, kind, b.shape[0], a.shape[1])

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta as a product of float64 factors.

        Shapes: see ``check``; the delta is (out, in).
        Memory: 8 bytes per value of A and B.
        """
        from adapterhub_tools.linalg.low_rank import LowRankTerm

        a, b = factors["A"].double(), factors["B"].double()
        lengths = a.norm(dim=1).clamp(min=_SMALLEST_NORM) * b.norm(dim=0).clamp(min=_SMALLEST_NORM)
        strength = factors["lambda"].double().reshape(()) / a.shape[0] / lengths
        return LowRankTerm(
            left=(b * strength).contiguous(),
            right=(a * factors["w_norm"].double()).contiguous(),
            scale=scaling_of(1.0, 1, "alpha", self.multiplier),
            exact_products=False,
            row=weight.row,
            column=weight.column,
        )


IMPLEMENTATION = DeLoRA
