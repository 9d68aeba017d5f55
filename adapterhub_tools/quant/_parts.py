"""What the formats have in common: messages about a weight's parts, and where its rows are."""

from __future__ import annotations

from math import prod

from adapterhub_tools.errors import FormatError
from adapterhub_tools.model.quant_parts import wrong_part
from adapterhub_tools.model.quant_scheme import QuantizedTensor


def damaged(tensor: QuantizedTensor, index: int) -> FormatError:
    """Returns the error for a scale that is not finite."""
    role = "scales" if "scales" in tensor.parts else "absmax"
    return FormatError(wrong_part(tensor, role, f"the scale at index {index} is not finite", "a number"))


def non_finite(name: str, index: int, beyond: str = "") -> FormatError:
    """Returns the error for a weight that cannot be quantised."""
    return FormatError.of(
        "non-finite",
        f"block or row {index} of the weight holds a value that is not finite{beyond}.",
        loc=name,
        remedy="The file is damaged or was saved from a diverged run: get it again.",
    )


def flat_bounds(shape: tuple[int, ...], first_row: int, rows: int) -> tuple[int, int]:
    """Returns where some rows begin and end in the sequence of all values."""
    columns = prod(shape[1:])
    return first_row * columns, (first_row + rows) * columns
