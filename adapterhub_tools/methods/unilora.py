"""Uni-LoRA: W' = W + B·A, every element of A and B one of a few trained numbers times a stored scale.

Source: Li et al. 2025, arXiv:2506.00799; peft/tuners/unilora/layer.py, ``_get_lora_matrices``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.linalg.surd import scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class UniLoRA:
    """A Uni-LoRA module whose places are stored; rank and length are those of the tensors.

    Without them (``save_indices``) they depend on the order of all modules in the model's class.

    Attributes:
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    place_roles: ClassVar[tuple[str, ...]] = ("indices_A", "indices_B")
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> UniLoRA:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"indices_A"`` and ``"scales_A"`` (rank, in), ``"indices_B"`` and ``"scales_B"`` (out,
                rank), and the shared ``"theta_d"`` (d,).
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        missing = {"indices_A", "scales_A", "indices_B", "scales_B", "theta_d"} - set(factors)
        if missing:
            anything = next(iter(factors.values()))
            return (wrong_factor(module, anything, f"{', '.join(sorted(missing))} beside it"),)
        a, b = factors["indices_A"], factors["indices_B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
            return (wrong_factor(module, b, f"[out, {a.shape[0] if a.shape else 'rank'}]"),)
        for role, shape in (("scales_A", a.shape), ("scales_B", b.shape)):
            if factors[role].shape != shape:
                return (wrong_factor(module, factors[role], f"{list(shape)}"),)
        return misfit_matrix(module, base, kind, b.shape[0], a.shape[1])

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta B·A as a product in the stored layout.

        Shapes: see ``check``; the delta is (out, in), or (in, out) for ``conv1d``.
        Dtype:  integers and floats in; float64 factors out, exact for floats up to float32.
        Memory: 24 bytes per value of A and B.

        Raises:
            FormatError: an index is beyond the trained numbers.
        """
        from adapterhub_tools.linalg.low_rank import LowRankTerm

        numbers = factors["theta_d"].double()
        sides = []
        for role in ("A", "B"):
            index = factors[f"indices_{role}"].long()
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= numbers.numel()):
                raise FormatError.of(
                    "place",
                    f"an index is {int(index.max())}, but there are {numbers.numel()} trained numbers.",
                    loc=f"unilora_indices_{role}",
                    remedy="The file is damaged: get it again.",
                )
            sides.append(numbers[index] * factors[f"scales_{role}"].double())
        a, b = sides
        left, right = (a.t(), b.t()) if weight.transposed else (b, a)
        return LowRankTerm(
            left=left.contiguous(),
            right=right.contiguous(),
            scale=scaling_of(1.0, 1, "alpha", self.multiplier),
            exact_products=False,
            row=weight.row,
            column=weight.column,
        )


IMPLEMENTATION = UniLoRA
