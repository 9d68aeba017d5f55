"""Why a tensor of stacked experts is another one: the same experts, packed otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from adapterhub_tools.model.plan import ByteRange
    from adapterhub_tools.model.protocols import OpenSource

_EXPERTS = re.compile(r"(.*\.experts)\.(\d+\.)?.*")


def packed_otherwise(start: ByteRange, merged: ByteRange, open_source: Callable[[str], OpenSource]) -> str:
    """Returns how two tensors of stacked experts, (experts, …, …), hold the same; nothing if they do not.

    Memory: two experts.

    Args:
        start: as it should be.
        merged: as it is.
        open_source: uri -> the open file.

    Raises:
        StoreError: a file cannot be read.
    """
    shapes = start.spec.shape, merged.spec.shape
    if len(shapes[0]) != 3 or len(shapes[1]) != 3 or start.spec.dtype != merged.spec.dtype:
        return ""
    count, rows, columns = shapes[0]
    if shapes[1] not in ((count, rows, columns), (count, columns, rows)) or not start.spec.elements:
        return ""
    if shapes[0] == shapes[1] and (order := _order(start, merged, open_source)) is not None:
        moved = [f"{place} holds that of {found}" for place, found in enumerate(order) if place != found]
        more = " and more" if len(moved) > 3 else ""
        return f"its experts are in another order: {', '.join(moved[:3])}{more}"
    width = start.spec.nbytes // start.spec.elements
    if shapes[1] == (count, columns, rows) and width in (1, 2, 4, 8):
        for expert in range(count):
            own, other = (_expert(item, expert, open_source) for item in (start, merged))
            matrix = np.frombuffer(own, f"u{width}").reshape(rows, columns)
            if matrix.T.tobytes() != other:
                return ""
        return "each of its experts is transposed"
    return ""


def packed_by_name(name: str, present: Iterable[str]) -> str:
    """Returns under which name the experts of a missing tensor may be; nothing if there is none.

    Args:
        name: the missing tensor.
        present: the names that are there.
    """
    found = _EXPERTS.fullmatch(name)
    if found is None:
        return ""
    one_by_one = found.group(2) is not None
    for other in present:
        match = _EXPERTS.fullmatch(other)
        if match and match.group(1) == found.group(1) and (match.group(2) is not None) != one_by_one:
            how = "stacked in one tensor" if one_by_one else "one by one"
            return f"the experts there are packed otherwise, {how}, as in {other}"
    return ""


def _order(start: ByteRange, merged: ByteRange, open_source: Callable[[str], OpenSource]) -> list[int] | None:
    """Returns which of the one's experts each of the other's is; None if they are not the same ones."""
    from hashlib import blake2b

    digests = [
        [blake2b(_expert(item, expert, open_source)).digest() for expert in range(item.spec.shape[0])]
        for item in (start, merged)
    ]
    if digests[0] == digests[1] or sorted(digests[0]) != sorted(digests[1]):
        return None
    return [digests[0].index(digest) for digest in digests[1]]


def _expert(item: ByteRange, expert: int, open_source: Callable[[str], OpenSource]) -> bytes:
    size = item.spec.nbytes // item.spec.shape[0]
    return bytes(open_source(item.uri).read(item.offset + expert * size, size))
