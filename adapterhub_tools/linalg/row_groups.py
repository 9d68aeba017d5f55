"""Expressions whose rows depend on the other rows of their group, such as rotations of the stored axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.linalg.computed import Computed

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.weight import Weight


class RowGroups(Computed):
    """The expression that makes rows [k·size, (k+1)·size) of w into those of x, for every k.

    A group that lies in the block is computed there. One that does not is read as a whole, computed, and
    kept until the next: 8 · size · columns bytes, and the same again while it is computed.

    Args:
        weight: w; its number of rows is a multiple of ``size``.
        size: rows of a group.
        compute: (whole groups in float64, shape (groups, size, columns), the first group) -> x, the same
            shape. It may change its argument.
        multiplier: see Computed.
    """

    def __init__(
        self,
        weight: Weight,
        size: int,
        compute: Callable[[Tensor, int], Tensor],
        multiplier: float = 1.0,
    ) -> None:
        """Keeps the function."""
        super().__init__(weight.rows, self._rows, multiplier)
        self._weight, self._size, self._groups = weight, size, compute
        self._kept: tuple[int, Tensor] | None = None

    def _rows(self, block: Tensor, row: int) -> Tensor:
        end = row + int(block.shape[0])
        parts: list[Tensor] = []
        at = row
        while at < end:
            group, inside = divmod(at, self._size)
            whole = (end - at) // self._size
            if inside == 0 and whole:
                count = whole * self._size
                some = block[at - row : at - row + count].reshape(whole, self._size, -1)
                parts.append(self._groups(some, group).reshape(count, -1))
            else:
                count = min(self._size - inside, end - at)
                parts.append(self._group(group)[inside : inside + count])
            at += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _group(self, group: int) -> Tensor:
        if self._kept is None or self._kept[0] != group:
            self._kept = None
            rows = self._weight.read_rows(group * self._size, self._size)
            made = self._groups(rows.reshape(1, self._size, -1), group)
            self._kept = (group, made.reshape(self._size, -1))
        return self._kept[1]
