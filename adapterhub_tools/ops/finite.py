"""Looks for NaN and infinities in stored tensors by their bits, without a tensor library.

A float is not finite exactly if all bits of its exponent are set (IEEE 754-2019, §3.4; bfloat16 has the
exponent of binary32). Of the 8-bit formats, E4M3 has no infinity and one NaN, E5M2 is like IEEE, and the FNUZ
forms have a single NaN where negative zero would be (arXiv:2209.05433; OCP 8-bit floating point, rev. 1.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Source
    from adapterhub_tools.model.tensor import TensorSpec

_CHUNK = 8 << 20

# dtype -> (numpy type of its bits, mask, the value under the mask that is not finite)
_PATTERNS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
}


def finite_problems(source: Source, tensors: Iterable[tuple[TensorSpec, int]]) -> list[Problem]:
    """Returns a problem for each tensor that holds a NaN or an infinity, with its first index.

    Args:
        source: the file.
        tensors: tensors and the offsets of their data in it.

    Memory: 16 MiB.

    Raises:
        StoreError: the data cannot be read.
    """
    import numpy as np

    found = []
    for spec, offset in tensors:
        if spec.dtype not in _PATTERNS:
            continue
        kind, mask, bad = _PATTERNS[spec.dtype]
        width = np.dtype(kind).itemsize
        count, first = 0, -1
        for start in range(0, spec.nbytes, _CHUNK):
            data = source.read(offset + start, min(_CHUNK, spec.nbytes - start))
            bits = np.frombuffer(data, dtype=kind)
            hits = np.flatnonzero((bits & bits.dtype.type(mask)) == bad)
            if hits.size and first < 0:
                first = start // width + int(hits[0])
            count += int(hits.size)
        if count:
            if spec.dtype == "C64":  # two parts are one value
                first //= 2
            found.append(
                Problem(
                    kind="non-finite",
                    message=f"{count} values are NaN or infinite, the first at index {_index(first, spec)}.",
                    file=source.name,
                    loc=spec.name,
                    remedy="The training diverged or the file is damaged; use an earlier checkpoint.",
                )
            )
    return found


def _index(flat: int, spec: TensorSpec) -> list[int]:
    """Returns the index along each axis of an element counted in storage order."""
    index = []
    for size in reversed(spec.shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return index[::-1]
