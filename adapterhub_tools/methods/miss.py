"""MiSS: W' = W + D tiled over the inputs, or (``bat``) W' = W + W·D + D in blocks.

Source: Kang and Yin 2024, arXiv:2409.15371; peft/tuners/miss/layer.py, ``get_delta_weight_miss`` and
``get_delta_weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression


@dataclass(frozen=True, slots=True, kw_only=True)
class MiSS:
    """The hyperparameters of a MiSS module.

    The tiled variants are correctly rounded; ``bat`` has the error of ``block_affine`` in linalg/tiles.py.

    Attributes:
        variant: ``True`` or ``False`` (tiled), ``"mini"`` (tiled over the outputs too) or ``"bat"``.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    variant: Any
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> MiSS:
        """Reads the hyperparameters; PEFT keeps the variant in ``init_weights``."""
        return cls(
            variant=read.choice(hparams, "init_weights", (True, False, "bat", "mini")),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the block's shape with the base weight's.

        Args:
            factors: ``"block"`` D: (rank, out); mini (rank, a divisor of out); bat (out / r, r, r).
            kind: ``"linear"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        block = factors["block"]
        shape = block.shape
        if kind != "linear" or len(base.shape) != 2:
            return (wrong_kind(module, kind, ("linear",)),)
        out, inner = base.shape
        if self.variant == "bat":
            if len(shape) != 3 or shape[1] != shape[2]:
                return (wrong_factor(module, block, "square blocks, three axes"),)
            if inner % shape[1]:
                return (wrong_factor(module, block, f"blocks whose size divides {inner}"),)
            return misfit_matrix(module, base, kind, shape[0] * shape[1], None)
        if len(shape) != 2 or shape[0] > inner:
            return (wrong_factor(module, block, f"[at most {inner}, {out}]"),)
        if self.variant == "mini":
            return () if out % shape[1] == 0 else (wrong_factor(module, block, f"[…, a divisor of {out}]"),)
        return misfit_matrix(module, base, kind, shape[1], None)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Expression:
        """Returns W + D tiled, or W + W·D + D in blocks.

        Shapes: see ``check``.
        Dtype:  any float in; sums of stored values for the tiled variants, float64 for bat.
        Memory: 8 bytes per value of D; any rows of W can be taken alone.
        """
        from adapterhub_tools.linalg.tiles import block_affine, tiled_sum

        if self.variant == "bat":
            return block_affine(factors["block"], weight, self.multiplier)
        return tiled_sum(factors["block"], weight, self.multiplier)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Expression:
        """Returns the weight before the merge: D taken off, for bat (W' − D)·(I + D)⁻¹ in blocks.

        Raises:
            LossyError: I + D has no inverse that float64 can hold.
        """
        from adapterhub_tools.linalg.tiles import block_affine_back, tiled_sum

        if self.variant == "bat":
            return block_affine_back(factors["block"], weight, self.multiplier)
        return tiled_sum(factors["block"], weight, -self.multiplier)


IMPLEMENTATION = MiSS
