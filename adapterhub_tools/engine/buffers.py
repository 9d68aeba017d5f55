"""What one worker thread keeps and reuses: its chunk buffers, and tensors read whole."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.linalg.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange
    from adapterhub_tools.model.protocols import OpenSource

CHUNK_BYTES = 8 << 20
"""Bytes read, hashed and written at a time."""


class Buffers:
    """Two byte buffers of at least CHUNK_BYTES, grown where one row needs more."""

    def __init__(self) -> None:
        """Allocates nothing until asked."""
        self._held: dict[str, Tensor] = {}

    def take(self, which: str, nbytes: int) -> Tensor:
        """Returns the first ``nbytes`` of a buffer, as uint8; its content is whatever it was."""
        held = self._held.get(which)
        if held is None or held.numel() < nbytes:
            held = torch.empty(max(nbytes, CHUNK_BYTES), dtype=torch.uint8)
            self._held[which] = held
        return held[:nbytes]


def memory_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous CPU uint8 tensor, without a copy."""
    view: memoryview = tensor.numpy().data
    return view


def torch_dtype(dtype: str) -> torch.dtype:
    """Returns the torch dtype of a safetensors float dtype."""
    if dtype not in FORMATS:
        raise UnsupportedError.of(
            "dtype",
            f"{dtype} is not a floating-point type that this operation computes with ({', '.join(FORMATS)}).",
            remedy="Convert the tensor to one of them first.",
        )
    found: torch.dtype = getattr(torch, FORMATS[dtype].torch_name)
    return found


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns how a tensor is worked on: (first axis, all others); a vector is a column."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


_INTEGERS = {"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}


def load_whole(source: OpenSource, item: ByteRange, *, places: bool = False) -> Tensor:
    """Reads a tensor of an adapter in its stored dtype, and checks that every value is finite.

    Args:
        source: the file.
        item: the tensor.
        places: True where it may hold integers: places in another tensor.

    Raises:
        FormatError: a value is NaN or infinite; names file, tensor and index.
        UnsupportedError: the dtype is not a float, nor an integer where those may be.
    """
    integers = _INTEGERS.get(item.spec.dtype) if places else None
    dtype: torch.dtype = getattr(torch, integers) if integers else torch_dtype(item.spec.dtype)
    raw = torch.empty(item.spec.nbytes, dtype=torch.uint8)
    if item.spec.nbytes:
        source.read_into(memory_of(raw), item.offset)
    tensor = raw.view(dtype).reshape(item.spec.shape)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = tuple(int(i) for i in torch.nonzero(~finite)[0])
        raise FormatError.of(
            "non-finite",
            f"the value at index {list(index)} is {float(tensor[index])}; a merge needs finite values.",
            file=source.name,
            loc=item.spec.name,
            remedy="The training run diverged or the file is damaged: use another checkpoint of the adapter.",
        )
    return tensor
