"""BOFT: W' = s ∘ (W·Rᵀ), with R a product of block-diagonal rotations between butterfly permutations.

Source: Liu et al. 2023, arXiv:2311.06243; peft/tuners/boft/layer.py, ``get_delta_weight`` and
``block_butterfly_perm``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import LossyError, Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import OTHER_BASE, misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class BOFT:
    """A BOFT module; block size, number and butterfly factors are those of the tensors.

    The error of an element is at most N·(b + 2)·2⁻⁵³ times what |R| makes of |W| for N factors of block size
    b, and that of the blocks (``cayley`` in linalg/cayley.py).

    Attributes:
        multiplier: the caller's factor on W' − W.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> BOFT:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the rotation's size and the scale's with the base weight's.

        Args:
            factors: ``"R"`` (N, blocks, b, b) and ``"s"``, out values.
            kind: ``"linear"`` or ``"conv2d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        blocks, scale = factors["R"], factors["s"]
        if kind not in ("linear", "conv2d") or len(base.shape) < 2:
            return (wrong_kind(module, kind, ("linear", "conv2d")),)
        if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3]:
            return (wrong_factor(module, blocks, "square blocks, four axes"),)
        count, number, size, _ = blocks.shape
        halvings = 1 << (count - 1)
        if count > 1 and (size % 2 or number % halvings):
            return (wrong_factor(module, blocks, f"even blocks, a multiple of {halvings} of them"),)
        inner = prod(base.shape[1:])
        if scale.elements != base.shape[0]:
            return misfit(module, base, (scale.elements, inner))
        if number * size == inner:
            return ()
        message = f"{number} blocks of {size} do not rotate the {inner} inputs of {base.name}."
        return (Problem(kind="shape", loc=module, message=message, remedy=OTHER_BASE),)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns s ∘ (W·Rᵀ).

        Shapes: R (N, blocks, b, b), s out values; a convolution counts as (out, in·kh·kw).
        Dtype:  any float in; float64 inside.
        Memory: 8·N·in·b bytes for the rotations, four times that while they are made. Any rows of W can be
            taken alone.
        """
        return self._rotated(factors, weight, backwards=False)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Computed:
        """Returns the weight before the merge, in float64: scales divided out, rotations turned back.

        Raises:
            LossyError: the merge was scaled, or a scale of an output is 0.
        """
        if self.multiplier != 1:
            raise LossyError.of(
                "scaled",
                f"the merge had the scale {self.multiplier:g}, and only a whole rotation is taken back.",
                remedy="Use the base itself.",
            )
        if bool((factors["s"] == 0).any()):
            raise LossyError.of(
                "zero-gain",
                "a scale of BOFT is 0, so the weights that it multiplied cannot be computed back.",
                remedy="Use the base itself.",
            )
        return self._rotated(factors, weight, backwards=True)

    def _rotated(self, factors: Mapping[str, Tensor], weight: Weight, *, backwards: bool) -> Computed:
        from adapterhub_tools.linalg.cayley import cayley
        from adapterhub_tools.linalg.computed import Computed
        from adapterhub_tools.linalg.rotations import rotate_columns

        stored = factors["R"].double()
        count, number, size, _ = (int(n) for n in stored.shape)
        skew = 0.5 * (stored - stored.transpose(2, 3)).reshape(-1, size, size)
        rotations = cayley(skew)
        turned = (rotations if backwards else rotations.transpose(1, 2)).reshape(stored.shape)
        levels = [(_butterfly(number, size, level, count), turned[level]) for level in range(count)]
        scale = factors["s"].double().reshape(-1)
        if backwards:
            levels.reverse()
            scale = 1 / scale

        def compute(block: Tensor, row: int) -> Tensor:
            for order, rotations in levels:
                if order is None:
                    block = rotate_columns(block, rotations)
                    continue
                # P·D·Pᵀ: take the columns in that order, rotate, put them back.
                rotated = rotate_columns(block[:, order[1]], rotations)
                block = rotated[:, order[0]]
            return block * scale[row : row + block.shape[0], None]

        return Computed(weight.rows, compute, self.multiplier)


def _butterfly(number: int, size: int, level: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Returns the permutation of a level and its inverse; None for the only level of an unmixed rotation.

    In groups of 2^level blocks, half-blocks at even places come before those at odd places.
    """
    import torch

    if count == 1:
        return None
    half = size // 2
    group = (number * size) // (number // (1 << level))
    halves = torch.arange(number * size).reshape(-1, group // half, half)
    order = torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=1).flatten()
    return order, torch.argsort(order)


IMPLEMENTATION = BOFT
