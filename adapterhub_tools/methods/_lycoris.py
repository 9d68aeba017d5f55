"""What LoHa and LoKr, which PEFT has from LyCORIS, have in common: hyperparameters and s = alpha / rank.

Not a method of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.model import hyperparameters as read

KINDS = ("linear", "conv2d", "convnd")
"""The layers that both adapt."""

Own = TypeVar("Own", bound="RankAndAlpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAndAlpha:
    """The hyperparameters of such a module.

    Attributes:
        rank: r, positive.
        alpha: alpha, as the config's JSON number.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    rank: int
    alpha: float
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls: type[Own], hparams: Mapping[str, Any]) -> Own:
        """Reads the hyperparameters of a target module; an absent one has PEFT's default, 8."""
        known = {"rank": 8, "alpha": 8, **hparams}
        return cls(
            rank=read.integer(known, "rank"),
            alpha=read.number(known, "alpha"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    @property
    def scale(self) -> Surd:
        """S times the multiplier, exactly."""
        return scaling_of(self.alpha, self.rank, "alpha/rank", self.multiplier)
