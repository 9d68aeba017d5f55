"""(IA)³: W' = W ⊙ l, one gain for each output, or for each input of a feedforward layer.

Source: Liu et al. 2022, arXiv:2205.05638, §3.3. Which side and the bias as in PEFT (peft/tuners/ia3/layer.py,
``merge``): a layer whose outputs are scaled has its bias scaled too, a feedforward layer has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.line_gains import LineInverse
    from adapterhub_tools.linalg.low_rank import LowRankTerm

_KINDS = ("linear", "conv1d", "conv2d", "convnd")


@dataclass(frozen=True, slots=True, kw_only=True)
class IA3:
    """The hyperparameters of one (IA)³ module.

    Attributes:
        feedforward: True if the gains are those of the inputs; None where the config does not say, and then
            the shape of l does.
        multiplier: the caller's factor m on the change: W + m·(W⊙l − W).
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False
    feedforward: bool | None = None
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> IA3:
        """Reads the hyperparameters of a target module."""
        return cls(feedforward=hparams.get("feedforward"), multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the gains with the base weight.

        Args:
            factors: ``"l"``: (out, 1), or (1, in) of a feedforward layer; (1, channels, 1, …) of a
                convolution.
            kind: the module's kind, see model/adapter.py; ``"bias"`` for its bias.
            base: the base weight or bias as stored.
            module: the module's path, for the message.
        """
        gains = factors["l"]
        count = prod(gains.shape)
        if kind == "bias":
            return misfit(module, base, (count,))
        if kind not in _KINDS:
            return (wrong_kind(module, kind, _KINDS),)
        if len(base.shape) < 2:
            return (wrong_kind(module, "vector", _KINDS),)
        if self.feedforward is None and kind in ("conv2d", "convnd"):
            return (wrong_factor(module, gains, 'a config with "feedforward_modules"'),)
        flat = kind in ("linear", "conv1d")
        axis = int(self._on_inputs(gains.shape))
        expected = (1, count) if axis else (count, 1)
        if flat and gains.shape != expected:
            side = "1 row, as the config calls it feedforward" if axis else "1 column, as it scales outputs"
            return (wrong_factor(module, gains, side),)
        if kind == "conv1d":
            axis = 1 - axis
        # A convolution in groups stores the inputs of one group.
        groups = count // base.shape[1] if axis and not flat and base.shape[1] else 1
        if groups > 1 and count == groups * base.shape[1] and base.shape[0] % groups == 0:
            return ()
        wanted = list(base.shape)
        wanted[axis] = count
        return misfit(module, base, tuple(wanted))

    def _on_inputs(self, shape: tuple[int, ...]) -> bool:
        """Says whether the gains are those of the inputs."""
        if self.feedforward is not None:
            return self.feedforward
        return shape[0] == 1 and prod(shape) > 1

    def bias_roles(
        self,
        factors: Mapping[str, TensorSpec],
        kind: str,  # noqa: ARG002 - the side that the gains are on decides
    ) -> tuple[str, ...]:
        """Returns the roles of the factors that change the module's bias."""
        return () if self._on_inputs(factors["l"].shape) else ("l",)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Expression:
        """Returns W ⊙ l in the stored layout, or b ⊙ l of a bias.

        Shapes: l has out values, or as many as there are inputs.
        Dtype:  any float in; the products are exact, so each value is rounded once.
        Memory: 8 bytes per row and column.
        """
        from adapterhub_tools.linalg.gain import Gain

        constant = 1 - Fraction(self.multiplier)
        by_row = not self._by_column(tuple(factors["l"].shape), weight.kind)
        return Gain(self._gains(factors["l"], weight), constant, weight.rows, by_row=by_row)

    def line_inverse(self, factors: Mapping[str, Tensor], weight: Weight) -> LineInverse:
        """Returns how W is predicted from W': ``g·W'``, with g = 1/l of each output or input.

        Args:
            factors: as for ``expression``.
            weight: the merged weight; it is not read.
        """
        from adapterhub_tools.linalg.line_gains import LineInverse

        return LineInverse(by_row=not self._by_column(tuple(factors["l"].shape), weight.kind))

    def has_line_inverse(self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec) -> bool:
        """Says whether ``line_inverse`` can be asked: not for the inputs of a grouped convolution."""
        gains = factors["l"]
        return not self._by_column(gains.shape, kind) or prod(gains.shape) == base.shape[1]

    def inverse(
        self,
        factors: Mapping[str, Tensor],
        weight: Weight,
        aux: Mapping[str, Any],  # noqa: ARG002 - the gains are all that is needed
    ) -> Expression:
        """Returns W' / l, the weight before the merge, in float64.

        Raises:
            LossyError: while it is evaluated, where a gain is 0.
        """
        from adapterhub_tools.linalg.gain import quotient

        constant = 1 - Fraction(self.multiplier)
        return quotient(self._gains(factors["l"], weight), constant, weight.rows)

    def _by_column(self, shape: tuple[int, ...], kind: str) -> bool:
        """Says whether the gains are those of the columns of the stored matrix."""
        on_inputs = kind != "bias" and self._on_inputs(shape)
        return not on_inputs if kind == "conv1d" else on_inputs

    def _gains(self, factor: Tensor, weight: Weight) -> LowRankTerm:
        """Returns m·l over the whole weight, as a product of rank 1, or of one rank for each group."""
        import torch

        from adapterhub_tools.linalg.low_rank import LowRankTerm

        values = factor.double().reshape(-1)
        if self._by_column(tuple(factor.shape), weight.kind):
            inner = weight.shape[1]
            groups = len(values) // inner
            right = values.view(groups, inner).repeat_interleave(weight.columns // inner, dim=1)
            group_of_row = torch.arange(weight.rows) // (weight.rows // groups)
            left = torch.nn.functional.one_hot(group_of_row, groups).double()
        else:
            left, right = values[:, None], values.new_ones(1, weight.columns)
        return LowRankTerm(
            left=left.contiguous(),
            right=right.contiguous(),
            scale=Surd(coefficient=Fraction(self.multiplier)),
            exact_products=True,
        )


IMPLEMENTATION = IA3
