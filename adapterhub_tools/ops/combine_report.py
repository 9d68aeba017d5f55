"""What a combination gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub_tools.ops.shrink_report import LowRankReport


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedInput:
    """One adapter of a combination.

    Attributes:
        label: what it is called in messages.
        path: where it is.
        digest: its adapter digest.
        method: its PEFT method.
        weight: what it counts where no pattern says otherwise.
        modules: how many modules it changes.
        ranks: rank -> number of modules.
    """

    label: str
    path: str
    digest: str
    method: str
    weight: float
    modules: int
    ranks: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns the adapter as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineReport(LowRankReport):
    """What a combination did, or with ``dry_run`` would do.

    Attributes:
        method: how the deltas were combined.
        space: what was combined, ``"deltas"`` or ``"factors"``.
        weights: pattern -> one number for each adapter, in the order given; ``"*"`` for all other modules.
        options: the method's hyperparameters.
        inputs: the adapters, in the order given.
    """

    method: str
    space: str
    weights: dict[str, list[float]]
    options: dict[str, Any]
    inputs: tuple[CombinedInput, ...]

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        ranks = ", ".join(f"{rank} ({count})" for rank, count in self.ranks.items())
        what = (
            f"{len(self.inputs)} adapters by {self.method}"
            f"{' in the space of factors, as PEFT does' if self.space == 'factors' else ''}, "
            f"{len(self.modules)} modules, rank {ranks}, {self.parameters:,} parameters, "
            f"error {self.totals.error:.3g}"
        )
        if self.dry_run:
            return f"dry run: {what}; nothing was written"
        return f"combine: {what}, {self.nbytes:,} bytes, {self.digest}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            **LowRankReport.to_json(self),
            "method": self.method,
            "space": self.space,
            "weights": self.weights,
            "options": self.options,
            "inputs": [item.to_json() for item in self.inputs],
        }
