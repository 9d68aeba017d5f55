"""LoRA: W' = W + s·B·A, with s = alpha / rank, or alpha / √rank for rsLoRA.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3 and §4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
Convolutions and embeddings as in PEFT (peft/tuners/lora/layer.py, ``_ConvNd.get_delta_weight``,
``Embedding.get_delta_weight``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.factors import low_rank
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.product_shape import check_product
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """The hyperparameters of one LoRA module.

    Attributes:
        rank: r, positive.
        alpha: lora alpha, as the config's JSON number.
        scaling: ``"alpha/rank"`` or ``"alpha/sqrt(rank)"``.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    needs_bias: ClassVar[bool] = True
    rank: int
    alpha: float
    scaling: str = "alpha/rank"
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> LoRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            rank=hparams["rank"],
            alpha=hparams["alpha"],
            scaling=hparams.get("scaling", "alpha/rank"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    @property
    def scale(self) -> Surd:
        """S times the multiplier, exactly."""
        return scaling_of(self.alpha, self.rank, self.scaling, self.multiplier)

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the base weight's.

        Args:
            factors: ``"A"`` (rank, in, …) and ``"B"`` (out, rank, …); ``"bias"`` (out,) for a bias.
            kind: the module's kind, see model/adapter.py; ``"bias"`` for its bias.
            base: the base weight or bias as stored.
            module: the module's path, for the message.
        """
        if kind == "bias":
            return _check_bias(factors["bias"], base, module)
        return check_product(factors["A"], factors["B"], kind, base, module)

    def bias_roles(
        self,
        factors: Mapping[str, TensorSpec],
        kind: str,  # noqa: ARG002 - the same for every kind
    ) -> tuple[str, ...]:
        """Returns the roles of the factors that change the module's bias."""
        return ("bias",) if "bias" in factors else ()

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta s·B·A of a weight, or s·b of a bias, as a product in the stored layout.

        Shapes: A (rank, in, …) and B (out, rank, …) give (out, in·…); for ``conv1d`` and ``embedding``,
        which are stored transposed, (in, out). For a bias, ``"bias"`` (out,) gives (out, 1).
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes per value of the factors.
        """
        if weight.kind != "bias":
            return low_rank(factors["A"], factors["B"], weight, self.scale)

        from adapterhub_tools.linalg.low_rank import LowRankTerm

        bias = factors["bias"]
        left = bias.double().reshape(-1, 1)
        return LowRankTerm(
            left=left,
            right=left.new_ones(1, 1),
            scale=self.scale,
            exact_products=bias.element_size() <= 4,
            row=weight.row,
        )


def _check_bias(bias: TensorSpec, base: TensorSpec, module: str) -> tuple[Problem, ...]:
    if bias.shape == base.shape:
        return ()
    return (
        Problem(
            kind="bias",
            loc=module,
            message=f"the adapter adds {list(bias.shape)} to a bias, but {base.name} of the base is "
            f"{list(base.shape)}.",
            remedy="Use the base that the adapter was trained on.",
        ),
    )


IMPLEMENTATION = LoRA
