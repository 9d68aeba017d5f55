"""What every way to combine has in common: hyperparameters made of options, and recorded by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Own = TypeVar("Own", bound="Method")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to combine; its fields are its hyperparameters."""

    @classmethod
    def from_options(cls: type[Own], options: Mapping[str, Any]) -> Own:
        """Makes it of options by name; a ValueError tells of wrong ones."""
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """Returns the hyperparameters, for receipts."""
        return asdict(self)

    def check(self, count: int) -> None:
        """Accepts any number of adapters."""
