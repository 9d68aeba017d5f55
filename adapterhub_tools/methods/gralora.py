"""GraLoRA: W' = W + s·Δ, each of the k×k blocks of Δ a product of its own, s = alpha / (rank + hybrid rank).

Source: Jung et al. 2025, arXiv:2505.20355; peft/tuners/gralora/layer.py, ``get_delta_weight``. Block (p, n)
is the product of part n of the rank of Bₚ and part p of the rank of Aₙ; a plain LoRA of the hybrid rank may
be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class GraLoRA:
    """The hyperparameters of a GraLoRA module.

    Attributes:
        rank: of all parts together, a multiple of the blocks per side.
        hybrid_rank: of the plain LoRA beside them, or 0.
        alpha: as the config's JSON number.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    rank: int
    hybrid_rank: int
    alpha: float
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> GraLoRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            rank=read.integer(hparams, "rank"),
            hybrid_rank=read.integer(hparams, "hybrid_r", at_least=0),
            alpha=read.number(hparams, "alpha"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"A"`` (k, in / k, rank), ``"B"`` (k, rank, out / k); with a hybrid rank h also
                ``"A_general"`` (h, in) and ``"B_general"`` (out, h).
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        a, b = factors["A"], factors["B"]
        if len(a.shape) != 3 or a.shape[2] != self.rank or self.rank % a.shape[0]:
            return (wrong_factor(module, a, f"[k, in / k, {self.rank}], {self.rank} a multiple of k"),)
        if len(b.shape) != 3 or b.shape[:2] != (a.shape[0], self.rank):
            return (wrong_factor(module, b, f"[{a.shape[0]}, {self.rank}, out / k]"),)
        inner, out = a.shape[0] * a.shape[1], b.shape[0] * b.shape[2]
        wanted = {"A_general": (self.hybrid_rank, inner), "B_general": (out, self.hybrid_rank)}
        for role, shape in wanted.items():
            spec = factors.get(role)
            if (spec is not None) != (self.hybrid_rank > 0) or (spec is not None and spec.shape != shape):
                return (wrong_factor(module, spec or a, f"{role} of shape {list(shape)} beside A and B"),)
        return misfit_matrix(module, base, kind, out, inner)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta as one product of inner size k·rank + h, whose factors hold blocks.

        Shapes: see ``check``; the delta is (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; float64 factors out.
        Memory: 8·(k·rank + h)·(in + out) bytes.
        """
        import torch

        from adapterhub_tools.linalg.low_rank import LowRankTerm

        exact = all(tensor.element_size() <= 4 for tensor in factors.values())
        a, b = factors["A"].double(), factors["B"].double()
        k, width, rank = (int(n) for n in a.shape)
        height, part = int(b.shape[2]), rank // k
        left = a.new_zeros(k * height, k * rank + self.hybrid_rank)
        right = a.new_zeros(k * rank + self.hybrid_rank, k * width)
        for p in range(k):
            left[p * height : (p + 1) * height, p * rank : (p + 1) * rank] = b[p].t()
            for n in range(k):
                own = slice(p * rank + n * part, p * rank + (n + 1) * part)
                right[own, n * width : (n + 1) * width] = a[n, :, p * part : (p + 1) * part].t()
        if self.hybrid_rank:
            left[:, k * rank :] = factors["B_general"].double()
            right[k * rank :] = factors["A_general"].double()
        if weight.transposed:
            left, right = right.t(), left.t()
        scale = Fraction(self.alpha) * Fraction(self.multiplier) / (self.rank + self.hybrid_rank)
        return LowRankTerm(
            left=torch.as_tensor(left).contiguous(),
            right=torch.as_tensor(right).contiguous(),
            scale=Surd(coefficient=scale),
            exact_products=exact,
            row=weight.row,
            column=weight.column,
        )


IMPLEMENTATION = GraLoRA
