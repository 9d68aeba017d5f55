"""HRA: W' = W·H, with H a product of Householder reflections (or one reflection of a subspace).

Source: Yuan, Liu and Xu 2024, arXiv:2405.17484; peft/tuners/hra/layer.py, ``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import FormatError, LossyError, Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class HRA:
    """The hyperparameters of an HRA module.

    The error of a row w of the result is at most r·(2·in + 8)·2⁻⁵³·‖w‖ (in the norm; without
    orthogonalisation, which adds what it loses: about r·2⁻⁵³ times the condition number of u).

    Attributes:
        orthogonalise: True to make the vectors orthonormal first (``apply_GS``).
        multiplier: the caller's factor on W' − W.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    orthogonalise: bool
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> HRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(orthogonalise=read.boolean(hparams, "apply_GS"), multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the vectors' length with the base weight's inputs.

        Args:
            factors: ``"u"`` (in, rank), for a convolution (in·kh·kw, rank).
            kind: ``"linear"`` or ``"conv2d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        u = factors["u"]
        if kind not in ("linear", "conv2d") or len(base.shape) < 2:
            return (wrong_kind(module, kind, ("linear", "conv2d")),)
        if len(u.shape) != 2:
            return (wrong_factor(module, u, "two axes"),)
        if prod(base.shape[1:]) == u.shape[0]:
            return ()
        return misfit(module, base, (base.shape[0], u.shape[0]))

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns W·(I − 2·u₁·u₁ᵀ)·(I − 2·u₂·u₂ᵀ)…, the vectors normalised.

        Shapes: u (in, r); W (out, in).
        Dtype:  any float in; float64 inside.
        Memory: 8 bytes per value of u; any rows of W can be taken alone.

        Raises:
            FormatError: a vector is zero, so it has no direction.
        """
        return self._reflected(factors, weight, backwards=False)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Computed:
        """Returns the weight before the merge, in float64: the reflections in reverse order.

        Raises:
            LossyError: the merge was scaled.
        """
        if self.multiplier != 1:
            raise LossyError.of(
                "scaled",
                f"the merge had the scale {self.multiplier:g}, and only a whole reflection is taken back.",
                remedy="Use the base itself.",
            )
        return self._reflected(factors, weight, backwards=True)

    def _reflected(self, factors: Mapping[str, Tensor], weight: Weight, *, backwards: bool) -> Computed:
        from adapterhub_tools.linalg.computed import Computed

        vectors = _normalised(factors["u"].double().t(), self.orthogonalise)
        if backwards:
            vectors = vectors.flip(0)

        def compute(block: Tensor, row: int) -> Tensor:  # noqa: ARG001 - every row is treated alike
            if self.orthogonalise:
                return block.addmm_(block @ vectors.t(), vectors, alpha=-2)
            for vector in vectors:
                block.addr_(block @ vector, vector, alpha=-2)
            return block

        return Computed(weight.rows, compute, self.multiplier)


def _normalised(vectors: Tensor, orthogonalise: bool) -> Tensor:
    """Returns rows of length 1, by Gram and Schmidt one after the other where asked."""
    made: list[Tensor] = []
    for number, vector in enumerate(vectors):
        rest = vector
        if orthogonalise:
            for other in made:
                rest = rest - (other @ rest) * other
        length = rest.norm()
        if not bool(length > 0):
            raise FormatError.of(
                "zero-vector",
                f"reflection vector {number} is zero, or in the span of those before it.",
                loc="hra_u",
                remedy="The training run collapsed: use another checkpoint of the adapter.",
            )
        made.append(rest / length)
    import torch

    return torch.stack(made)


IMPLEMENTATION = HRA
