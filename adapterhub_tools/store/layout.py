"""Where tensors lie in a safetensors file that this package writes.

The format's own library orders metadata by a hash map, so that its files differ from run to run. Here the
same tensors and metadata are the same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import Problem, UnsupportedError
from adapterhub_tools.model.tensor import DTYPE_BITS
from adapterhub_tools.store.header import MAX_HEADER_BYTES, MAX_TENSORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterhub_tools.model.tensor import TensorSpec

DATA_ALIGNMENT = 64
"""The data starts at a multiple of this many bytes: a cache line, and the widest vector register."""


def build_file(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Lays out a file.

    The header is JSON without spaces, ``__metadata__`` first (left out if empty), then the tensors sorted by
    name, then spaces up to a multiple of 64 bytes. The data follows in the order given. Only if a tensor
    would then not begin at a multiple of its element's size are wider dtypes put first, their order otherwise
    kept.

    Args:
        specs: the tensors in the order of their data.
        metadata: the strings for ``__metadata__``.

    Returns:
        The bytes before the data (eight bytes of length, then the header), and name -> the byte offset of the
        data from the start of the file, in the order of the data.

    Raises:
        UnsupportedError: more tensors, or a longer header, than this package reads back.
        ValueError: a name given twice.
    """
    ordered = list(specs)
    if not _aligned(ordered):
        ordered.sort(key=lambda spec: -DTYPE_BITS[spec.dtype])
    begins: dict[str, int] = {}
    entries: dict[str, Any] = {}
    position = 0
    for spec in ordered:
        if spec.name in entries:
            raise ValueError(f"the tensor {spec.name!r} is given twice")
        begins[spec.name] = position
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header.update(sorted(entries.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES or len(ordered) > MAX_TENSORS:
        message = f"a file of {len(ordered):,} tensors has a header of {len(text):,} bytes; the limits are "
        message += f"{MAX_TENSORS:,} and {MAX_HEADER_BYTES:,}."
        remedy = "Spread the tensors over more files."
        raise UnsupportedError(Problem(kind="header-too-large", message=message, remedy=remedy))
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def _aligned(specs: Sequence[TensorSpec]) -> bool:
    """Returns whether each tensor would begin at a multiple of its element's size."""
    position = 0
    for spec in specs:
        if position % max(1, DTYPE_BITS[spec.dtype] // 8):
            return False
        position += spec.nbytes
    return True
