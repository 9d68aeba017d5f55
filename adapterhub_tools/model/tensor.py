"""What a stored tensor is: a name, a dtype and a shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits per element of every dtype that the safetensors format defines (version 0.8)."""

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
"""The dtypes that a merge reads and writes."""

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names used on the command line and in a model's config -> safetensors names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor as its container describes it; no data.

    Attributes:
        name: the key in the container.
        dtype: a safetensors dtype name, such as ``"BF16"``.
        shape: the dimensions, row-major; ``()`` is a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the data."""
        return self.elements * DTYPE_BITS[self.dtype] // 8

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"name", "dtype", "shape"}``."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorSpec:
        """Reads what ``to_json`` wrote."""
        return cls(name=data["name"], dtype=data["dtype"], shape=tuple(data["shape"]))
