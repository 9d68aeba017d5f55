"""RoAd: W' = R·W and b' = R·b, with R made of scaled rotations of pairs of outputs.

Source: Liao and Monz 2024, arXiv:2409.00119, eq. 4; peft/tuners/road/layer.py, ``_apply_road`` and
``_prepare_cols``. The pairs are the places h and h + g/2 of a group of g outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import LossyError, Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed import Computed

_PER_OUTPUT = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}
"""Variant -> trained angles per output, as a fraction."""


_SMALLEST_DETERMINANT = 1e-9
"""Relative to its elements; below it, a float32 weight cannot be computed back to its own precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoAd:
    """The hyperparameters of a RoAd module.

    The error of an element is at most 6·2⁻⁵³·(|x| + |y|)·max|α| for the pair (x, y) that it came from.

    Attributes:
        variant: ``"road_1"``, ``"road_2"`` or ``"road_4"``: how many angles a pair has (1, 2 or 4).
        group: g, even.
        multiplier: the caller's factor on W' − W.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = False
    variant: str
    group: int
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> RoAd:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            variant=read.choice(hparams, "variant", tuple(_PER_OUTPUT)),
            group=read.integer(hparams, "group_size", at_least=2),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def bias_roles(self, factors: Mapping[str, TensorSpec], kind: str) -> tuple[str, ...]:
        """Returns the factors that act on a bias: all, where the layer has one."""
        return tuple(factors) if kind == "linear" else ()

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the number of angles with the base weight's outputs.

        Args:
            factors: ``"theta"`` and ``"alpha"``, one axis each.
            kind: ``"linear"`` or ``"bias"``.
            base: the base weight, or the bias, as stored.
            module: the module's path, for the message.
        """
        if kind not in ("linear", "bias"):
            return (wrong_kind(module, kind, ("linear",)),)
        theta, alpha = factors["theta"], factors["alpha"]
        if len(theta.shape) != 1 or alpha.shape != theta.shape:
            return (wrong_factor(module, alpha, f"as many as angles, {list(theta.shape)}"),)
        top, below = _PER_OUTPUT[self.variant]
        out = theta.elements * below // top
        if self.group % 2 or out % self.group:
            return (wrong_factor(module, theta, f"angles for groups of {self.group}, an even number"),)
        return misfit(module, base, (out, *base.shape[1:]))

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Computed:
        """Returns R·W, or R·b for a bias.

        Shapes: theta and alpha (out / 2,), (out,) or (2·out,).
        Dtype:  any float in; float64 inside.
        Memory: 16·out bytes; groups of g rows of W are taken together.
        """
        first, second = self._columns(factors["theta"].double(), factors["alpha"].double())
        return self._mixed(first, second, weight, self.multiplier)

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the factors are all that is needed
    ) -> Computed:
        """Returns the weight before the merge, in float64: each pair by the inverse of its 2×2 matrix.

        Raises:
            LossyError: a pair's matrix is singular, or nearly so.
        """
        first, second = self._columns(factors["theta"].double(), factors["alpha"].double())
        first = (1 - self.multiplier) + self.multiplier * first
        second = self.multiplier * second
        half = self.group // 2
        size = first[:, :half] * first[:, half:] + second[:, :half] * second[:, half:]
        largest = (first.square() + second.square()).reshape(-1, 2, half).sum(dim=1)
        if bool((size.abs() <= _SMALLEST_DETERMINANT * largest).any()):
            raise LossyError.of(
                "singular",
                "a pair of outputs is mixed by a singular matrix, so its weights cannot be computed back.",
                remedy="Use the base itself.",
            )
        both = size.repeat(1, 2)
        return self._mixed(first.roll(half, dims=1) / both, -second / both, weight, 1.0)

    def _mixed(self, first: Tensor, second: Tensor, weight: Weight, multiplier: float) -> Computed:
        from adapterhub_tools.linalg.row_groups import RowGroups

        half = self.group // 2

        def groups(some: Tensor, at: int) -> Tensor:
            own = first[at : at + some.shape[0], :, None]
            other = second[at : at + some.shape[0], :, None]
            made = some * own
            made[:, :half] -= some[:, half:] * other[:, :half]
            made[:, half:] += some[:, :half] * other[:, half:]
            return made

        return RowGroups(weight, self.group, groups, multiplier)

    def _columns(self, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Returns α·cos θ and α·sin θ for every output, in groups."""
        if self.variant == "road_4":
            angles, scales = theta.reshape(-1, 2, self.group), alpha.reshape(-1, 2, self.group)
            return scales[:, 0] * angles[:, 0].cos(), scales[:, 1] * angles[:, 1].sin()
        if self.variant == "road_1":
            theta = theta.reshape(-1, self.group // 2).repeat(1, 2)
            alpha = alpha.reshape(-1, self.group // 2).repeat(1, 2)
        angles, scales = theta.reshape(-1, self.group), alpha.reshape(-1, self.group)
        return scales * angles.cos(), scales * angles.sin()


IMPLEMENTATION = RoAd
