"""How several adapters become one change of a tensor, where that is not simply their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedInput:
    """One adapter's part in the combination of a tensor.

    Attributes:
        terms: how many of the step's terms are its own; 0 where it does not change the tensor. They follow
            those of the inputs before it.
        key: the adapter's digest: random numbers and the order of sums go by it.
        weight: the caller's weight, where the method weighs; 1 where it is in the terms' multipliers.
    """

    terms: int
    key: str
    weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns the input as a JSON object."""
        return {"terms": self.terms, "key": self.key, "weight": self.weight}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How the terms of a step are combined.

    Attributes:
        method: a name of the registry ``combine``.
        hparams: its hyperparameters.
        name: what the tensor is called where random numbers depend on it.
        inputs: the adapters.
    """

    method: str
    hparams: dict[str, Any]
    name: str
    inputs: tuple[CombinedInput, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the combination as a JSON object."""
        return {
            "method": self.method,
            "hparams": self.hparams,
            "name": self.name,
            "inputs": [item.to_json() for item in self.inputs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Combination:
        """Reads what ``to_json`` wrote."""
        return cls(
            method=data["method"],
            hparams=data["hparams"],
            name=data["name"],
            inputs=tuple(CombinedInput(**item) for item in data["inputs"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinationChoice:
    """What was asked for: the method of a merge whose adapters are combined, and weights beyond one for each.

    Attributes:
        method: a name of the registry ``combine``.
        hparams: its hyperparameters, all of them.
        weights: pattern -> a weight for each adapter, for the modules that it names.
    """

    method: str
    hparams: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the choice as it stands in a receipt."""
        return {
            "method": self.method,
            "hyperparameters": dict(self.hparams),
            "weights": {pattern: list(found) for pattern, found in self.weights.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CombinationChoice:
        """Reads what ``to_json`` wrote."""
        return cls(
            method=data["method"],
            hparams=data["hyperparameters"],
            weights={pattern: tuple(found) for pattern, found in data["weights"].items()},
        )
