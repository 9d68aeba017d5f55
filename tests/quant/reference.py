"""bitsandbytes as the reference: weights quantised and dequantised by it, in the terms of this package."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.quant_scheme import QuantizedTensor, QuantScheme
from adapterhub_tools.model.tensor import TensorSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bitsandbytes import functional

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {torch.uint8: "U8", torch.int8: "I8", **{dtype: name for name, dtype in DTYPES.items()}}
FOUR_BIT = ("nf4", "fp4")


def scheme(format_: str, *, double: bool = False, block_size: int = 64) -> QuantScheme:
    if format_ == "int8":
        return QuantScheme(format="int8")
    return QuantScheme(format=format_, double=double, block_size=block_size)


def quantize(weight: Tensor, how: QuantScheme) -> tuple[Tensor, Any]:
    """The library's packed weight and its state; one thread, because torch's sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return functional.quantize_4bit(
            weight.clone(), blocksize=how.block_size, quant_type=how.format, compress_statistics=how.double
        )
    finally:
        torch.set_num_threads(threads)


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The library's weights, from a flat view: its AVX-512 kernel errs where blocks cross rows."""
    shape, old = state.shape, state.dtype
    state.shape, state.dtype = torch.Size([1, shape.numel()]), dtype
    try:
        flat = functional.dequantize_4bit(packed, state)
    finally:
        state.shape, state.dtype = shape, old
    if state.quant_type == "fp4":
        flat += 0.0  # the sign of its second zero depends on the kernel
    return flat.reshape(-1)[: shape.numel()].reshape(shape)


def parts_of(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """The parts of a 4-bit weight by role, as the library saves them."""
    saved = state.as_dict(packed=True)
    names = {key: key.partition(".")[0] for key in saved}
    return {"data": packed, **{names[key]: value for key, value in saved.items()}}


def described(
    shape: tuple[int, ...], how: QuantScheme, parts: dict[str, Tensor], *, dtype: str = "BF16", **fields: Any
) -> QuantizedTensor:
    """A description of parts that lie in no file."""
    ranges = {
        role: ByteRange(
            uri="model.safetensors",
            offset=0,
            spec=TensorSpec(name=f"m.weight.{role}", dtype=NAMES[part.dtype], shape=tuple(part.shape)),
        )
        for role, part in parts.items()
    }
    return QuantizedTensor(
        spec=TensorSpec(name="m.weight", dtype=dtype, shape=shape), scheme=how, parts=ranges, **fields
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes: a zero's sign counts."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, theirs = one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    return torch.equal(mine, theirs)
