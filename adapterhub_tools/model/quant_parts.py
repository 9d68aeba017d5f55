"""The tensors that a quantised weight is stored as: their names, and what their dtypes and shapes must be."""

from __future__ import annotations

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.quant_scheme import BLOCK_SIZES, QuantizedTensor

STATE_MARK = ".quant_state.bitsandbytes__"
"""What stands between a 4-bit weight's name and its format, in the name of the tensor with its JSON."""
FOUR_BIT_SUFFIXES = {
    "absmax": ".absmax",
    "quant_map": ".quant_map",
    "nested_absmax": ".nested_absmax",
    "nested_quant_map": ".nested_quant_map",
}
"""Role -> what follows a 4-bit weight's name."""
INT8_NAMES = {"scales": "SCB", "weight_format": "weight_format"}
"""Role -> what takes the place of ``weight`` in an int8 weight's name."""
GET_AGAIN = "The checkpoint is damaged or was changed: get it again, or quantise the 16-bit base again."

_FLOATS = ("F32", "F16", "BF16")


def part_name(weight: str, role: str, scheme: str) -> str:
    """Returns the name on disk of one part of a weight."""
    if role == "data":
        return weight
    if role in INT8_NAMES:
        return weight.removesuffix("weight") + INT8_NAMES[role]
    return weight + (f"{STATE_MARK}{scheme}" if role == "quant_state" else FOUR_BIT_SUFFIXES[role])


def wrong_part(tensor: QuantizedTensor, role: str, found: str, expected: str) -> Problem:
    """Returns a problem with one part of a quantised weight."""
    part = tensor.parts.get(role, tensor.parts["data"])
    return Problem(
        kind="quantised-part",
        file=part.uri.replace("\\", "/").rpartition("/")[2],
        loc=tensor.parts[role].spec.name
        if role in tensor.parts
        else part_name(tensor.spec.name, role, tensor.scheme.format),
        message=f"{found}, expected {expected}.",
        remedy=GET_AGAIN,
    )


def part_problems(tensor: QuantizedTensor) -> tuple[Problem, ...]:
    """Returns what is wrong with the dtypes and shapes of a quantised weight's parts, or is missing."""
    return _int8_problems(tensor) if tensor.scheme.format == "int8" else _four_bit_problems(tensor)


def _four_bit_problems(tensor: QuantizedTensor) -> tuple[Problem, ...]:
    scheme, elements = tensor.scheme, tensor.spec.elements
    if scheme.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        expected = f"a block size of bitsandbytes ({sizes})"
        return (wrong_part(tensor, "quant_state", f"its block size is {scheme.block_size}", expected),)
    problems = []
    nbytes, wanted_bytes = tensor.parts["data"].spec.nbytes, (elements + 1) // 2
    if nbytes != wanted_bytes:
        expected = f"{wanted_bytes:,} for shape {list(tensor.spec.shape)}"
        problems.append(wrong_part(tensor, "data", f"it has {nbytes:,} bytes", expected))
    blocks = -(-elements // scheme.block_size)
    wanted: dict[str, tuple[tuple[str, ...], int]] = {
        "absmax": (("U8",) if scheme.double else _FLOATS, blocks),
        "quant_map": (("F32",), 16),
    }
    if scheme.double:
        groups = -(-blocks // scheme.nested_block_size)
        wanted |= {"nested_absmax": (("F32",), groups), "nested_quant_map": (("F32",), 256)}
    for role, (dtypes, count) in wanted.items():
        why = f" ({elements:,} weights in blocks of {scheme.block_size})" if role == "absmax" else ""
        problems += _array_problems(tensor, role, dtypes, count, why)
    return tuple(problems)


def _int8_problems(tensor: QuantizedTensor) -> tuple[Problem, ...]:
    problems = []
    data, shape = tensor.parts["data"].spec, tensor.spec.shape
    if data.dtype != "I8" or len(shape) != 2:
        found = f"it is {data.dtype} of shape {list(data.shape)}"
        problems.append(wrong_part(tensor, "data", found, "I8 of shape (out, in)"))
    problems += _array_problems(tensor, "scales", _FLOATS, shape[0] if shape else 1, ", one for each output")
    if "weight_format" in tensor.parts:
        problems += _array_problems(tensor, "weight_format", ("U8",), 1)
    return tuple(problems)


def _array_problems(
    tensor: QuantizedTensor, role: str, dtypes: tuple[str, ...], count: int, why: str = ""
) -> list[Problem]:
    expected = f"{count:,} of {' or '.join(dtypes)}{why}"
    part = tensor.parts.get(role)
    if part is None:
        return [wrong_part(tensor, role, "it is missing", expected)]
    if part.spec.dtype in dtypes and part.spec.elements == count:
        return []
    found = f"it is {part.spec.dtype} of shape {list(part.spec.shape)}"
    return [wrong_part(tensor, role, found, expected)]
