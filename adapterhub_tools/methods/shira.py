"""SHiRA: W' = W + S, with S sparse: trained values at fixed places.

Source: Bhardwaj et al. 2024, arXiv:2406.13175; peft/tuners/shira/layer.py, ``get_delta_weight``. The places
are stored with the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.stored_term import SparseTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class SHiRA:
    """A SHiRA module.

    Attributes:
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    place_roles: ClassVar[tuple[str, ...]] = ("indices",)
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> SHiRA:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other.

        Args:
            factors: ``"weight"`` (n,) and ``"indices"`` (2, n): rows, then columns.
            kind: ``"linear"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        values, places = factors["weight"], factors.get("indices")
        if kind != "linear":
            return (wrong_kind(module, kind, ("linear",)),)
        if places is None:
            return (wrong_factor(module, values, "its places, shira_indices, beside it"),)
        if len(values.shape) != 1 or places.shape != (2, *values.shape):
            return (wrong_factor(module, places, f"[2, {values.elements}]"),)
        return misfit_matrix(module, base, kind, None, None)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> SparseTerm:
        """Returns the delta S.

        Shapes: values (n,) at places (2, n) give (out, in); values at one place are added.
        Memory: about 40 bytes per value.

        Raises:
            FormatError: a place lies outside the weight.
        """
        from adapterhub_tools.linalg.stored_term import SparseTerm

        rows, columns = factors["indices"].long()
        for found, size, axis in ((rows, weight.rows, "row"), (columns, weight.columns, "column")):
            if found.numel() and (int(found.min()) < 0 or int(found.max()) >= size):
                raise FormatError.of(
                    "place",
                    f"{axis} {int(found.min())} to {int(found.max())} of a weight that has {size}.",
                    loc="shira_indices",
                    remedy="The file is damaged or belongs to another base: get it again.",
                )
        return SparseTerm(
            factors["weight"].double(),
            rows * weight.columns + columns,
            height=weight.rows,
            width=weight.columns,
            scale=Surd(coefficient=Fraction(self.multiplier)),
        )


IMPLEMENTATION = SHiRA
