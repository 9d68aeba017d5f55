"""DoRA: W' = m · (W + s·B·A) / ‖W + s·B·A‖, the norm of each output's weights; s as in LoRA.

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5. The norm is taken over the inputs of an output, as in PEFT
(peft/tuners/lora/dora.py, ``get_weight_norm``), and of W + s·B·A: LyCORIS' ``dora_scale`` with one value for
each *input*, and loaders that divide by the norm of W alone, are other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import LossyError, Problem
from adapterhub_tools.linalg.factors import low_rank
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import wrong_factor
from adapterhub_tools.model.product_shape import check_product
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.line_gains import LineInverse


@dataclass(frozen=True, slots=True, kw_only=True)
class DoRA:
    """The hyperparameters of one DoRA module.

    Attributes:
        rank: r, positive.
        alpha: lora alpha, as the config's JSON number.
        scaling: ``"alpha/rank"`` or ``"alpha/sqrt(rank)"``.
        multiplier: the caller's factor c on the whole change: W + c·(W' − W). PEFT's ``scale_layer`` is
            another thing: it scales s alone, and at 0 it still leaves m/‖W‖.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = False
    rank: int
    alpha: float
    scaling: str = "alpha/rank"
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> DoRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            rank=hparams["rank"],
            alpha=hparams["alpha"],
            scaling=hparams.get("scaling", "alpha/rank"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    @property
    def scale(self) -> Surd:
        """S, exactly."""
        return scaling_of(self.alpha, self.rank, self.scaling)

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the base weight's.

        Args:
            factors: ``"A"`` (rank, in, …), ``"B"`` (out, rank, …) and ``"magnitude"``, one value for each
                output, or for each dimension of an embedding.
            kind: the module's kind, see model/adapter.py.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        a, b, magnitude = factors["A"], factors["B"], factors.get("magnitude")
        if magnitude is None:
            return (wrong_factor(module, b, "a magnitude beside it"),)
        if prod(magnitude.shape) != b.shape[0]:
            return (wrong_factor(module, magnitude, f"one value for each of {b.shape[0]} outputs"),)
        return check_product(a, b, kind, base, module)

    def expression(self, factors: Mapping[str, Tensor], weight: Weight) -> Expression:
        """Returns the merged weight in the stored layout.

        Shapes: A (rank, in, …), B (out, rank, …), magnitude out values: (out, in·…); for ``conv1d`` and
        ``embedding``, which are stored transposed, (in, out), and the weight is read twice.
        Dtype:  any float in; rounded once.
        Memory: 8 bytes per value of the factors, and one more block.
        Raises: LossyError, while it is evaluated, where an output's weights are all zero.
        """
        from adapterhub_tools.linalg.normalised import Normalised

        return Normalised(
            low_rank(factors["A"], factors["B"], weight, self.scale),
            factors["magnitude"].double().reshape(-1),
            weight.read_rows,
            rows=weight.rows,
            columns=weight.columns,
            by_row=not weight.transposed,
            multiplier=self.multiplier,
        )

    def line_inverse(self, factors: Mapping[str, Tensor], weight: Weight) -> LineInverse:
        """Returns how W is predicted from W': ``g·W' − s·B·A``, with g = ‖W + s·B·A‖/m of each output.

        Args:
            factors: as for ``expression``.
            weight: the merged weight; it is not read.
        """
        from adapterhub_tools.linalg.line_gains import LineInverse

        scale = Surd(coefficient=-self.scale.coefficient, radicand=self.scale.radicand)
        delta = low_rank(factors["A"], factors["B"], weight, scale)
        return LineInverse(by_row=not weight.transposed, delta=delta)

    def has_line_inverse(
        self,
        factors: Mapping[str, TensorSpec],  # noqa: ARG002 - the shapes do not enter
        kind: str,  # noqa: ARG002 - the caller asks only of those that it can invert
        base: TensorSpec,  # noqa: ARG002 - nor does its shape
    ) -> bool:
        """Says whether ``line_inverse`` can be asked: not where only a part of the change is merged."""
        return self.multiplier == 1

    def inverse(self, factors: Mapping[str, Tensor], weight: Weight, aux: Mapping[str, Any]) -> Expression:
        """Returns the weight before the merge, in float64.

        The merged weight says nothing of ‖W + s·B·A‖, so that has to be kept.

        Args:
            factors: as for ``expression``.
            weight: the merged weight.
            aux: ``"norms"``, a float64 tensor with one norm for each output: ``Normalised.norms``.

        Raises:
            LossyError: a magnitude is 0, so the weights under it are gone; or the norms are not given.
        """
        from adapterhub_tools.linalg.normalised import denormalised

        magnitudes = factors["magnitude"].double().reshape(-1)
        if "norms" not in aux:
            raise LossyError.of(
                "no-norms",
                "the norms that DoRA divided by were not kept.",
                remedy="Use the base itself, or merge again and keep them.",
            )
        if bool((magnitudes == 0).any()):
            raise LossyError.of(
                "zero-gain",
                "a magnitude of DoRA is 0, so the weights that it multiplied cannot be computed back.",
                loc="magnitude",
                remedy="Use the base itself.",
            )
        return denormalised(
            low_rank(factors["A"], factors["B"], weight, self.scale),
            magnitudes,
            aux["norms"],
            weight.rows,
            by_row=not weight.transposed,
            multiplier=self.multiplier,
        )


IMPLEMENTATION = DoRA
