"""LN-tuning: W' = N, b' = c: normalisation layers (or others) trained whole, stored as they are.

Source: Zhao et al. 2023, arXiv:2312.11420; peft/tuners/ln_tuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import LossyError, Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class LNTuning:
    """A layer that replaces the base's; no number enters but its own.

    As for every tensor that replaces another, the caller's factor on deltas does not apply.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False
    needs_bias: ClassVar[bool] = True

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> LNTuning:  # noqa: ARG003 - there are none
        """Reads nothing."""
        return cls()

    def bias_roles(
        self,
        factors: Mapping[str, TensorSpec],
        kind: str,  # noqa: ARG002 - part of what a method may tell apart
    ) -> tuple[str, ...]:
        """Returns the factor that replaces the bias, where there is one."""
        return ("bias",) if "bias" in factors else ()

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the tensor's shape with the one that it replaces.

        Args:
            factors: ``"weight"``, and ``"bias"`` where the layer has one.
            kind: any; ``"bias"`` asks about the bias.
            base: the base tensor as stored.
            module: the module's path, for the message.
        """
        role = "bias" if kind == "bias" else "weight"
        if role not in factors:
            return (wrong_factor(module, next(iter(factors.values())), f"a {role} beside it"),)
        return misfit(module, base, factors[role].shape)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns the stored values; rounded once where the output's dtype is narrower.

        Shapes: that of the base tensor.
        Memory: 8 bytes per value.
        """
        from adapterhub_tools.linalg.computed import Computed

        role = "bias" if weight.kind == "bias" else "weight"
        values = factors[role].double().reshape(weight.rows, -1)
        return Computed(weight.rows, lambda block, row: values[row : row + block.shape[0]])

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
            "the layer was replaced, and the merged weight says nothing of the one before.",
            remedy="Use the base itself.",
        )


IMPLEMENTATION = LNTuning
