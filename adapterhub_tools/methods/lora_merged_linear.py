"""MergedLinear of PEFT 0.1 and 0.2: W' = W + s·Bᵢ·Aᵢ in the rows of slice i of a fused projection.

The outputs are cut into as many equal slices as ``enable_lora`` has entries. Each slice that is enabled has
factors of its own, and s = alpha / rank; the others stay.

Source: Hu et al. 2021, arXiv:2106.09685, and loralib (``MergedLinear``), of which PEFT 0.2 had a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLinearLoRA:
    """The hyperparameters of one fused projection.

    Attributes:
        rank: r of each slice, positive.
        alpha: lora alpha, as the config's JSON number.
        enabled: which slices are changed.
        scaling: ``"alpha/rank"``.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    rank: int
    alpha: float
    enabled: tuple[bool, ...]
    scaling: str = "alpha/rank"
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> MergedLinearLoRA:
        """Reads the hyperparameters of a target module.

        Raises:
            FormatError: one of them is absent or of another type.
        """
        return cls(
            rank=read.integer(hparams, "rank"),
            alpha=read.number(hparams, "alpha"),
            enabled=read.booleans(hparams, "enable_lora"),
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
        """Compares the factors' shapes with the slices and with the base weight's.

        Args:
            factors: ``"A"`` (rank × enabled slices, in) and ``"B"`` (width × enabled slices, rank, 1), which
                was the weight of a convolution in groups.
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        a, b = factors["A"], factors["B"]
        groups = sum(self.enabled)
        if len(a.shape) != 2 or a.shape[0] != self.rank * groups:
            return (wrong_factor(module, a, f"{self.rank} rows for each of {groups} enabled slices"),)
        if b.shape[1:] not in ((self.rank,), (self.rank, 1)) or b.shape[0] % groups:
            return (wrong_factor(module, b, f"[a multiple of {groups}, {self.rank}, 1]"),)
        return misfit_matrix(module, base, kind, b.shape[0] // groups * len(self.enabled), a.shape[1])

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta: one product whose left factor is zero outside each slice's own block.

        Shapes: A and B as in ``check`` give (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes × out × rank × enabled slices.
        """
        import torch

        from adapterhub_tools.linalg.factors import low_rank

        b = factors["B"].flatten(1)
        groups = sum(self.enabled)
        width = b.shape[0] // groups
        spread = torch.zeros(width * len(self.enabled), self.rank * groups, dtype=b.dtype)
        group = 0
        for number, enabled in enumerate(self.enabled):
            if enabled:
                rows = slice(number * width, (number + 1) * width)
                columns = slice(group * self.rank, (group + 1) * self.rank)
                spread[rows, columns] = b[group * width : (group + 1) * width]
                group += 1
        return low_rank(factors["A"], spread, weight, self.scale)


IMPLEMENTATION = MergedLinearLoRA
