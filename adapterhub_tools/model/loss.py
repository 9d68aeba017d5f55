"""How much of a merge's change its output can hold: sums over weights, and what follows from them.

A merge changes W by dW = W' - W; what is written is W'_q, so the change that arrives is dW_q = W'_q - W.
Where a step of the output's grid is larger than the change, rounding brings the old weight back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, log10, sqrt
from typing import Any

SURVIVAL_LIMIT = 0.5
"""A merge onto a quantised target of which less survives is refused unless it is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Sums over the weights of one tensor, or of several.

    Attributes:
        values: how many weights were compared.
        delta: ||dW||^2.
        kept: <dW_q, dW>.
        error: ||W'_q - W'||^2.
        merged: ||W'||^2.
    """

    values: int = 0
    delta: float = 0.0
    kept: float = 0.0
    error: float = 0.0
    merged: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        """Returns the loss over the weights of both."""
        return Loss(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @property
    def survival(self) -> float | None:
        """<dW_q, dW> / ||dW||^2, the share of the change that arrives: 1 is all; None without a change."""
        return None if self.delta == 0 else self.kept / self.delta

    @property
    def relative_error(self) -> float | None:
        """||dW_q - dW|| / ||dW||, the error relative to the change; None without a change."""
        return None if self.delta == 0 else sqrt(self.error) / sqrt(self.delta)

    @property
    def sqnr(self) -> float | None:
        """10*log10(||W'||^2 / ||W'_q - W'||^2), in dB; inf where nothing is lost, None where W' is 0."""
        if self.merged == 0:
            return None
        return inf if self.error == 0 else 10 * (log10(self.merged) - log10(self.error))

    def to_json(self) -> dict[str, Any]:
        """Returns the three figures; JSON has no infinity, so an SQNR without an error is null."""
        figures = {
            "survival": self.survival,
            "relative_error": self.relative_error,
            "sqnr_db": self.sqnr,
        }
        finite = {n: None if f is None or not isfinite(f) else f for n, f in figures.items()}
        return {"values": self.values, **finite}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """The loss of a merge, tensor by tensor.

    Attributes:
        sampled: True if rows of each tensor were compared, False if all.
        tensors: output tensor -> its loss, in the order of the files.
    """

    sampled: bool
    tensors: Mapping[str, Loss]

    @property
    def total(self) -> Loss:
        """The loss over all tensors."""
        return sum(self.tensors.values(), Loss())

    @property
    def words(self) -> str:
        """One line for people."""
        total = self.total
        if total.survival is None or total.relative_error is None or total.sqnr is None:
            return "the adapters change no value"
        of = f"a sample of {total.values:,} values" if self.sampled else f"all {total.values:,} values"
        error = f"error {total.relative_error:.2g} of the change, SQNR {total.sqnr:.1f} dB"
        return f"{total.survival:.2%} of the change survives rounding; {error}; over {of} of the targets"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "sampled": self.sampled,
            "total": self.total.to_json(),
            "tensors": {name: loss.to_json() for name, loss in self.tensors.items()},
        }
