"""DEFT: W' = W − Q·(Rightᵀ·W) + s·Q·R: a subspace of the outputs is removed, and something put in its place.

With ``qr`` Q is the orthonormal factor of P and Right is Q; with ``relu`` Q is P and Right is max(P, 0). PaRa
only removes. Source: peft/tuners/deft/layer.py, ``_project`` and ``_delta_from_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import LossyError, Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DEFT:
    """The hyperparameters of a DEFT module.

    The error is at most (out + r + 8)·2⁻⁵³·(|W| + |Q|·|Right|ᵀ·|W| + |s|·|Q|·|R|) elementwise, and with
    ``qr`` that of Q: about r·2⁻⁵³ times the condition number of P.

    Attributes:
        decomposition: ``"qr"`` or ``"relu"``.
        alpha: s = alpha / rank; None or 0 for s = 1.
        removes: True for PaRa, which has no R.
        multiplier: the caller's factor on W' − W.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    decomposition: str
    alpha: float | None
    removes: bool
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> DEFT:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            decomposition=read.choice(hparams, "decomposition_method", ("qr", "relu")),
            alpha=read.number(hparams, "alpha") if hparams.get("alpha") else None,
            removes=read.boolean(hparams, "para"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"P"`` (out, rank), and ``"R"`` (rank, in) unless it only removes.
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        p, r = factors["P"], factors.get("R")
        if len(p.shape) != 2 or p.shape[1] > p.shape[0]:
            return (wrong_factor(module, p, "[out, rank], a rank of at most out"),)
        if self.removes != (r is None):
            return (wrong_factor(module, r or p, "deft_R beside it exactly if para is false"),)
        if r is not None and (len(r.shape) != 2 or r.shape[0] != p.shape[1]):
            return (wrong_factor(module, r, f"[{p.shape[1]}, in]"),)
        return misfit_matrix(module, base, kind, p.shape[0], None if r is None else r.shape[1])

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns W + Q·(s·R − Rightᵀ·W).

        Shapes: see ``check``.
        Dtype:  any float in; float64 inside.
        Memory: 8 bytes per value of P, Q, R and Rightᵀ·W (r, in). The weight is read once, 256 rows at a
            time, before the first row of the result; for ``conv1d`` its rows can be taken alone.
        """
        import torch

        from adapterhub_tools.linalg.computed import Computed

        p = factors["P"].double()
        if self.decomposition == "qr":
            q, _ = torch.linalg.qr(p)
            right = q
        else:
            q, right = p, p.clamp(min=0)
        put = (
            factors["R"].double() * (self.alpha / p.shape[1] if self.alpha else 1.0)
            if "R" in factors
            else None
        )

        if weight.transposed:

            def stored_transposed(block: Tensor, row: int) -> Tensor:
                change = -(block @ right)
                if put is not None:
                    change += put[:, row : row + block.shape[0]].t()
                block.addmm_(change, q.t())
                return block

            return Computed(weight.rows, stored_transposed, self.multiplier)
        removed = right.new_zeros(int(p.shape[1]), weight.columns)
        for first in range(0, weight.rows, _ROWS_AT_ONCE):
            rows = weight.read_rows(first, min(_ROWS_AT_ONCE, weight.rows - first))
            removed.addmm_(right[first : first + rows.shape[0]].t(), rows)
        change = -removed if put is None else put - removed

        def stored_as_is(block: Tensor, row: int) -> Tensor:
            block.addmm_(q[row : row + block.shape[0]], change)
            return block

        return Computed(weight.rows, stored_as_is, self.multiplier)

    def inverse(
        self,
        factors: Mapping[str, Tensor],  # noqa: ARG002 - nothing could help
        weight: Weight,  # noqa: ARG002 - likewise
        aux: Mapping[str, Any],  # noqa: ARG002 - likewise
    ) -> Computed:
        """Refuses: what was there before is not in the merged weight.

        Raises:
            LossyError: always.
        """
        raise LossyError.of(
            "not-invertible",
            "DEFT removes a subspace of the outputs, which the merged weight no longer has.",
            remedy="Use the base itself.",
        )


IMPLEMENTATION = DEFT
