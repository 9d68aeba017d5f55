"""Super-Tuning: W' = W + S, S trained values at fixed places; with a rank (Supra) also + (alpha / rank)·B·A.

Source: peft/tuners/supertuning/layer.py, ``get_delta_weight``. The places are flat: row · in + column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import DeltaTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperTuning:
    """The hyperparameters of a Super-Tuning module.

    Attributes:
        rank: of the product, or None without one.
        alpha: as the config's JSON number; only with a rank.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    place_roles: ClassVar[tuple[str, ...]] = ("indices",)
    rank: int | None
    alpha: float
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> SuperTuning:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        has_rank = hparams.get("rank") is not None
        return cls(
            rank=read.integer(hparams, "rank") if has_rank else None,
            alpha=read.number(hparams, "alpha") if has_rank else 0.0,
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"values"`` (n,) and ``"indices"`` (n,); with a rank also ``"A"`` (rank, in) and ``"B"``
                (out, rank).
            kind: ``"linear"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        values, places = factors["values"], factors.get("indices")
        if kind != "linear":
            return (wrong_kind(module, kind, ("linear",)),)
        if places is None:
            return (wrong_factor(module, values, "its places beside it (save_precomputed_indices)"),)
        if len(values.shape) != 1 or places.shape != values.shape:
            return (wrong_factor(module, places, f"[{values.elements}]"),)
        a, b = factors.get("A"), factors.get("B")
        if self.rank is None:
            if a is not None or b is not None:
                return (wrong_factor(module, a or b or values, "a rank in the config"),)
            return misfit_matrix(module, base, kind, None, None)
        if a is None or len(a.shape) != 2 or a.shape[0] != self.rank:
            return (wrong_factor(module, a or values, f"A of shape [{self.rank}, in]"),)
        if b is None or len(b.shape) != 2 or b.shape[1] != self.rank:
            return (wrong_factor(module, b or values, f"B of shape [out, {self.rank}]"),)
        return misfit_matrix(module, base, kind, b.shape[0], a.shape[1])

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> DeltaTerm:
        """Returns the delta.

        Shapes: see ``check``; the delta is (out, in). Values at one place are added.
        Memory: about 40 bytes per value, and 8 per value of A and B.

        Raises:
            FormatError: a place lies outside the weight.
        """
        from adapterhub_tools.linalg.low_rank import LowRankTerm
        from adapterhub_tools.linalg.stored_term import SparseTerm
        from adapterhub_tools.linalg.term_sum import TermSum

        places, size = factors["indices"].long(), weight.rows * weight.columns
        if places.numel() and (int(places.min()) < 0 or int(places.max()) >= size):
            raise FormatError.of(
                "place",
                f"place {int(places.max())} of a weight that has {size} values.",
                loc="supertuning_indices",
                remedy="The file is damaged or belongs to another base: get it again.",
            )
        sparse = SparseTerm(
            factors["values"].double(),
            places,
            height=weight.rows,
            width=weight.columns,
            scale=Surd(coefficient=Fraction(self.multiplier)),
        )
        if self.rank is None:
            return sparse
        scale = Fraction(self.alpha) * Fraction(self.multiplier) / self.rank
        product = LowRankTerm(
            left=factors["B"].double().contiguous(),
            right=factors["A"].double().contiguous(),
            scale=Surd(coefficient=scale),
            exact_products=all(factors[role].element_size() <= 4 for role in "AB"),
        )
        return TermSum((product, sparse))


IMPLEMENTATION = SuperTuning
