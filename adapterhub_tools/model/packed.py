"""A merged weight that is quantised as it is written, and lies in several tensors then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.model.tensor import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """A tensor of the output and where its bytes go.

    Attributes:
        spec: name, dtype and shape.
        file: the output file, relative to the output folder.
        offset: where its bytes go in it.
    """

    spec: TensorSpec
    file: str
    offset: int

    def to_json(self) -> dict[str, Any]:
        """Returns the tensor as a JSON object."""
        return {"file": self.file, "offset": self.offset, **self.spec.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PlacedTensor:
        """Reads what ``to_json`` wrote."""
        return cls(spec=TensorSpec.from_json(data), file=data["file"], offset=data["offset"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedOutput:
    """How a weight is quantised, and the tensors that it is written as.

    Attributes:
        scheme: how.
        parts: role -> tensor, see QuantizedTensor.
    """

    scheme: QuantScheme
    parts: dict[str, PlacedTensor]

    def to_json(self) -> dict[str, Any]:
        """Returns the output as a JSON object."""
        return {
            "scheme": {**self.scheme.to_json(), "nested_block_size": self.scheme.nested_block_size},
            "parts": {role: part.to_json() for role, part in sorted(self.parts.items())},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PackedOutput:
        """Reads what ``to_json`` wrote."""
        said = data["scheme"]
        scheme = replace(QuantScheme.from_json(said), nested_block_size=said["nested_block_size"])
        return cls(
            scheme=scheme,
            parts={role: PlacedTensor.from_json(part) for role, part in data["parts"].items()},
        )
