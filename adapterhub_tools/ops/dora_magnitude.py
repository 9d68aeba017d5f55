"""Magnitudes of DoRA: the norms of W + ΔW, and their best fit when ΔW was approximated.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W' = m · d/‖d‖ with d = W + ΔW, the norm over the inputs of
each output. PEFT stores W as (out, in), Conv1D and embeddings as (in, out); either way there is one magnitude
for each output.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.effects import Effects

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
        opened: the adapter before.
        base: the base's folder or file.
        stack: closes the files.
    """

    def __init__(self, opened: OpenedAdapter, base: Path, stack: ExitStack) -> None:
        """Opens the base and fits the adapter to it."""
        self._effects = Effects(opened, base, stack)

    @property
    def base_input(self) -> HistoryInput:
        """The base as an input of an operation: the digest of the target tensors."""
        return self._effects.base.targets_input(self._effects.fit)

    def magnitude(self, path: str, old: Tensor, before: Factors, after: Factors) -> Tensor:
        """Returns the magnitudes of one module, in the shape of the old ones.

        Args:
            path: the module.
            old: m, float64.
            before: B, A and s as they were.
            after: as they are stored now.
        """
        target = self._effects.of_module(path)
        kind = next(module.kind for module in self._effects.fit.modules if module.path == path)
        inner, own, new = _sums(self._effects.weight(target), kind, before, after)
        lengths = (own * new).sqrt()
        cosine = (inner / lengths).where(lengths > 0, lengths.new_ones(()))
        return (old.reshape(-1) * cosine).reshape(old.shape)


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
