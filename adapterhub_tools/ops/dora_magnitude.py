"""Magnitudes of DoRA: the norms of W + ΔW, and their best fit when ΔW was approximated.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W' = m · d/‖d‖ with d = W + ΔW, the norm over the inputs of
each output. PEFT stores W as (out, in), Conv1D and embeddings as (in, out); either way there is one magnitude
for each output.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.ops.base_rows import OpenBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from adapterhub_tools.engine.row_blocks import StoredRows

Factors = tuple["Tensor", "Tensor", float]
"""B (out, rank), A (rank, in·…), both float64, and the scale s of s·B·A."""


def norms(weight: StoredRows, kind: str, factors: Factors) -> Tensor:
    """Returns ‖W + s·B·A‖ for each output, float64, shape (out,).

    Args:
        weight: W as stored.
        kind: the module's kind.
        factors: B, A and s.
    """
    import torch

    total: Tensor | None = None
    rows = []
    for first, block in weight.blocks():
        d = _add(block, kind, factors, first)
        if kind in TRANSPOSED:
            part = d.square().sum(dim=0)
            total = part if total is None else total + part
        else:
            rows.append(d.norm(dim=1))
    return torch.cat(rows) if total is None else total.sqrt()


class Refit:
    """Computes magnitudes anew on a base, for deltas that were approximated.

    For each output, m' = m·⟨d, d'⟩ / (‖d‖·‖d'‖) makes m'·d'/‖d'‖ the closest to m·d/‖d‖ in Euclid's norm,
    with d = W + ΔW before and d' = W + ΔW' after: the projection onto the new direction.

    Args:
        adapter: the adapter before.
        base: the base's folder or file.
    """

    def __init__(self, adapter: Adapter, base: Path) -> None:
        """Opens the base and fits the adapter to it."""
        self._base = OpenBase(base)
        self._fit = self._base.fit(adapter)

    @property
    def base_input(self) -> HistoryInput:
        """The base as an input of an operation: the digest of the target tensors."""
        return self._base.targets_input(self._fit)

    def magnitude(self, path: str, old: Tensor, before: Factors, after: Factors) -> Tensor:
        """Returns the magnitudes of one module, in the shape of the old ones.

        Args:
            path: the module.
            old: m, float64.
            before: B, A and s as they were.
            after: as they are stored now.
        """
        kind = next(module.kind for module in self._fit.modules if module.path == path)
        weight = self._base.rows(self._fit, path)
        inner, own, new = _sums(weight, kind, before, after)
        lengths = (own * new).sqrt()
        cosine = (inner / lengths).where(lengths > 0, lengths.new_ones(()))
        return (old.reshape(-1) * cosine).reshape(old.shape)

    def __enter__(self) -> Refit:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the base."""
        self._base.close()


def _sums(weight: StoredRows, kind: str, before: Factors, after: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ⟨d, d'⟩, ‖d‖² and ‖d'‖² for each output."""
    import torch

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    axis = 0 if kind in TRANSPOSED else 1
    for first, block in weight.blocks():
        d, other = _add(block, kind, before, first), _add(block, kind, after, first)
        parts.append(((d * other).sum(dim=axis), d.square().sum(dim=axis), other.square().sum(dim=axis)))
    columns = zip(*parts, strict=True)
    join = torch.cat if axis else _sum
    inner, own, new = (join(list(column)) for column in columns)
    return inner, own, new


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _add(block: Tensor, kind: str, factors: Factors, first: int) -> Tensor:
    """Returns rows of W + s·B·A in the stored layout."""
    b, a, scale = factors
    end = first + int(block.shape[0])
    if kind in TRANSPOSED:
        return block.addmm(a[:, first:end].t(), b.t(), alpha=scale)
    return block.addmm(b[first:end], a, alpha=scale)
