"""Rounding a float64 tensor once, to a storage dtype: nearest, ties to even (docs/numerics.md).

torch's own cast from float64 to bfloat16 or float16 goes through float32 and rounds twice.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.errors import LossyError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder

if TYPE_CHECKING:
    from torch import Tensor


def cast(values: Tensor, dtype: str, *, name: str = "") -> Tensor:
    """Returns the correctly rounded values in a storage dtype.

    Args:
        values: float64, finite, any shape.
        dtype: a safetensors name: F64, F32, BF16 or F16.
        name: what to call the tensor in the message.

    Raises:
        LossyError: a value is beyond the dtype.
    """
    shape = tuple(values.shape)
    rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
    out = torch.empty(rows, columns, dtype=getattr(torch, FORMATS[dtype].torch_name))
    start = values.detach().double().cpu().reshape(rows, columns).contiguous()
    rounder = BlockRounder(DeltaSum((), rows), columns=columns, start=FORMATS["F64"], to=FORMATS[dtype])
    wrong = rounder.round_rows(start, out, 0)
    if wrong is not None:
        raise LossyError.of(
            "overflow",
            f"the value {wrong.start:g} at row {wrong.row}, column {wrong.column} is beyond {dtype}.",
            loc=name,
            remedy="Write a wider type with --dtype float32.",
        )
    return out.reshape(shape)
