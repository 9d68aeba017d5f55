"""AdaLoRA: W' = W + s·B·diag(E)·A, with s = alpha / (init_r + 1e-5).

Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3 (P Λ Q). The scale is PEFT's (peft/tuners/adalora/layer.py,
``get_delta_weight``): it divides by the rank before pruning, with 1e-5 added, and the rank pattern of the
config has already been applied to the stored factors.
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
from adapterhub_tools.model.misfit import misfit, misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm

_KINDS = ("linear", "conv1d", "conv2d")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoRA:
    """The hyperparameters of one AdaLoRA module.

    Attributes:
        initial_rank: the rank before pruning, ``init_r``.
        alpha: lora alpha, as the config's JSON number; the initial rank takes its place where it is not
            positive.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    initial_rank: int
    alpha: float
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> AdaLoRA:
        """Reads the hyperparameters of a target module; absent ones have PEFT's defaults, 12 and 8."""
        return cls(
            initial_rank=hparams.get("init_r", 12),
            alpha=hparams.get("alpha", 8),
            multiplier=hparams.get("multiplier", 1.0),
        )

    @property
    def scale(self) -> Surd:
        """S times the multiplier, exactly."""
        top = Fraction(self.alpha if self.alpha > 0 else self.initial_rank) * Fraction(self.multiplier)
        return Surd(coefficient=top / (self.initial_rank + Fraction(1e-5)))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"A"`` (rank, in), ``"B"`` (out, rank) and ``"E"`` (rank, 1); the inputs of a
                convolution are its channels times its kernel. A rank of 0 is allowed: pruned away.
            kind: the module's kind, see model/adapter.py.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        absent = {"A", "B", "E"} - set(factors)
        if absent:
            return (_absent(module, absent, next(iter(factors.values()))),)
        a, b, e = factors["A"], factors["B"], factors["E"]
        for spec in (a, b, e):
            if len(spec.shape) != 2:
                return (wrong_factor(module, spec, "two axes"),)
        if not a.shape[0] == b.shape[1] == e.shape[0] or e.shape[1] != 1:
            wanted = f"[{a.shape[0]}, 1], as A is {list(a.shape)} and B {list(b.shape)}"
            return (wrong_factor(module, e, wanted),)
        if kind not in _KINDS:
            return (wrong_kind(module, kind, _KINDS),)
        if kind != "conv2d":
            return misfit_matrix(module, base, kind, b.shape[0], a.shape[1])
        fits = b.shape[0] == base.shape[0] and a.shape[1] == prod(base.shape[1:])
        return () if fits else misfit(module, base, (b.shape[0], a.shape[1]))

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta s·B·diag(E)·A in the stored layout.

        Shapes: A (rank, in), B (out, rank), E (rank, 1) give (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes per value of the factors.
        """
        from adapterhub_tools.linalg.factors import low_rank, row_scaled

        return low_rank(*row_scaled(factors["A"], factors["B"], factors["E"]), weight, self.scale)


def _absent(module: str, roles: set[str], spec: TensorSpec) -> Problem:
    return Problem(
        kind="missing-tensor",
        loc=spec.name,
        message=f"{module} has no factor {', '.join(sorted(roles))}.",
        remedy="The file is incomplete; save the adapter again.",
    )


IMPLEMENTATION = AdaLoRA
