"""What the formats have in common: messages about a weight's parts, and where its rows are."""

from __future__ import annotations

from math import prod

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.model.quant_scheme import QuantizedTensor

GET_AGAIN = "The checkpoint is damaged or was changed: get it again, or quantise the 16-bit base again."


def wrong_part(tensor: QuantizedTensor, role: str, found: str, expected: str) -> Problem:
    """Returns a problem with one part of a quantised weight."""
    part = tensor.parts.get(role, tensor.parts["data"])
    name = part.spec.name if role in tensor.parts else f"{tensor.spec.name}.{role}"
    return Problem(
        kind="quantised-part",
        file=part.uri.replace("\\", "/").rpartition("/")[2],
        loc=name,
        message=f"{found}, expected {expected}.",
        remedy=GET_AGAIN,
    )


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
