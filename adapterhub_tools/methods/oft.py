"""OFT: W' = W·Rᵀ, with R block-diagonal and orthogonal, each block from a skew-symmetric matrix.

Source: Qiu et al. 2023, arXiv:2306.07280; peft/tuners/oft/layer.py, ``OFTRotationModule``.
Embeddings are rotated where they come out: W' = W·R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import OTHER_BASE, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed

_KINDS = ("linear", "embedding", "conv2d")


@dataclass(frozen=True, slots=True, kw_only=True)
class OFT:
    """The hyperparameters of an OFT module.

    The error is that of ``rotated_inputs`` (linalg/rotations.py), and that of the blocks of R: of ``cayley``,
    or for the series a few 2⁻⁵³ times its terms.

    Attributes:
        series: True for the truncated Neumann series of Cayley's transform, False for the transform.
        terms: of the series.
        constrained: True to shrink each skew-symmetric block to the norm ``radius`` / √blocks (COFT).
        radius: ``eps``, for the constrained form.
        shared: True if one block stands for all.
        multiplier: the caller's factor on W' − W.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    series: bool
    terms: int
    constrained: bool
    radius: float
    shared: bool
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> OFT:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        series = read.boolean(hparams, "use_cayley_neumann")
        constrained = read.boolean(hparams, "coft")
        return cls(
            series=series,
            terms=read.integer(hparams, "num_cayley_neumann_terms") if series else 1,
            constrained=constrained,
            radius=read.number(hparams, "eps") if constrained else 0.0,
            shared=read.boolean(hparams, "block_share"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the rotation's size with the axis of the base weight that it turns.

        Args:
            factors: ``"R"`` (blocks, b·(b − 1)/2): strict upper triangles, row by row.
            kind: ``"linear"``, ``"embedding"``, or ``"conv2d"`` with a 1×1 kernel.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        entries = factors["R"]
        if kind not in _KINDS or len(base.shape) < 2:
            return (wrong_kind(module, kind, _KINDS),)
        if prod(base.shape[2:]) != 1:
            return (
                Problem(
                    kind="not-representable",
                    loc=module,
                    message=f"the kernel is {list(base.shape[2:])}; PEFT rotates each patch of the input and "
                    "adds up where patches overlap, which is no convolution with another weight.",
                    remedy="Serve it as an adapter with PEFT.",
                ),
            )
        if len(entries.shape) != 2 or _size(entries.shape[1]) is None:
            return (wrong_factor(module, entries, "[blocks, b·(b − 1)/2] for a block size b"),)
        inner = base.shape[1]
        size = _size(entries.shape[1]) or 1
        blocks = inner // size if self.shared and inner % size == 0 else entries.shape[0]
        if blocks * size == inner and (not self.shared or entries.shape[0] == 1):
            return ()
        message = f"{entries.shape[0]} blocks of {size} do not rotate the {inner} inputs of {base.name}."
        return (Problem(kind="shape", loc=module, message=message, remedy=OTHER_BASE),)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns W·Rᵀ, or W·R for an embedding.

        Shapes: R (blocks, b·(b − 1)/2).
        Dtype:  any float in; float64 inside.
        Memory: 8·in·b bytes for the rotation, four times that while it is made. Any rows of W can be
            taken alone.
        """
        from adapterhub_tools.linalg.rotations import rotated_inputs, rotated_outputs

        made = rotated_outputs if weight.kind == "embedding" else rotated_inputs
        return made(self._rotations(factors), weight, self.multiplier)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Computed:
        """Returns the weight before the merge, in float64: R⁻¹ in the place of R.

        Raises:
            LossyError: a block has no inverse that float64 can hold; Cayley's own blocks always have one.
        """
        from adapterhub_tools.linalg.rotations import inverse_blocks, rotated_inputs, rotated_outputs

        made = rotated_outputs if weight.kind == "embedding" else rotated_inputs
        return made(inverse_blocks(self._rotations(factors), self.multiplier), weight, 1.0)

    def _rotations(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Returns the blocks of R."""
        from adapterhub_tools.linalg.cayley import cayley, cayley_series, skew_from_triangle

        entries = factors["R"].double()
        size = _size(int(entries.shape[1])) or 1
        skew = skew_from_triangle(entries, size)
        if self.constrained:
            radius = self.radius / float(entries.shape[0]) ** 0.5
            norms = skew.flatten(1).norm(dim=1)[:, None, None]
            skew = skew * (radius / norms.clamp(min=radius))
        return cayley_series(skew, self.terms) if self.series else cayley(skew)


def _size(entries: int) -> int | None:
    """Returns b with b·(b − 1)/2 = ``entries``, or None if there is none."""
    size = (1 + isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else None


IMPLEMENTATION = OFT
