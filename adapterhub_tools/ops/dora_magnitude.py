"""Magnitudes of DoRA: the norms of W + ΔW, and their best fit when ΔW was approximated.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5): W' = m · d/‖d‖ with d = W + ΔW, the norm over the inputs of
each output. PEFT stores W as (out, in), Conv1D and embeddings as (in, out); either way there is one magnitude
for each output.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How the directions of a module's outputs turned when its delta was approximated.

    With d = W + ΔW before and d' = W + ΔW' after, each for one output; every tensor is float64, shape (out,).

    Attributes:
        cosine: ⟨d, d'⟩ / (‖d‖·‖d'‖).
        gap: 1 − cosine, without the cancellation of that difference.
        change: ‖m·d/‖d‖ − W‖², what the adapter changed before.
        magnitude: m before, flat.
    """

    cosine: Tensor
    gap: Tensor
    change: Tensor
    magnitude: Tensor

    def closest(self) -> Tensor:
        """Returns m' = m·cosine, which makes m'·d'/‖d'‖ the closest to m·d/‖d‖ in Euclid's norm."""
        return self.magnitude * self.cosine

    def norm(self) -> float:
        """Returns the Frobenius norm of what the adapter changed before."""
        return float(self.change.sum().sqrt())

    def distance(self, magnitude: Tensor) -> float:
        """Returns ‖m'·d'/‖d'‖ − m·d/‖d‖‖ over all outputs, with magnitudes m'.

        Its square is (m' − m)² + 2·m·m'·(1 − cosine) for each output.
        """
        new = magnitude.double().reshape(-1)
        squares = (new - self.magnitude).square() + 2 * self.magnitude * new * self.gap
        return float(squares.sum().clamp_min(0).sqrt())


class Refit:
    """Computes magnitudes anew on a base, for deltas that were approximated.

    For each output, m' = m·⟨d, d'⟩ / (‖d‖·‖d'‖): the projection onto the new direction. It is at least as
    close as m, also after its rounding: m has the same dtype, where no number is nearer than the nearest.

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

    def alignment(self, path: str, magnitude: Tensor, before: Factors, after: Factors) -> Alignment:
        """Compares the directions of one module's outputs before and after.

        Args:
            path: the module.
            magnitude: m, float64.
            before: B, A and s as they were.
            after: as they are stored now.
        """
        target = self._effects.of_module(path)
        kind = next(module.kind for module in self._effects.fit.modules if module.path == path)
        own, turned, step, delta, cross = _sums(self._effects.weight(target), kind, before, after)
        flat = magnitude.reshape(-1)
        new = own + 2 * turned + step
        lengths = (own * new).sqrt()
        some = lengths > 0
        one = lengths.new_ones(())
        lengths = lengths.where(some, one)
        cosine = ((own + turned) / lengths).where(some, one)
        # sin² = (‖d‖²·‖δ‖² − ⟨d, δ⟩²) / (‖d‖²·‖d'‖²), and 1 − cos = sin² / (1 + cos).
        sine = (own * step - turned.square()).clamp_min(0) / lengths.square()
        gap = (sine / (1 + cosine)).where(cosine > 0, 1 - cosine).where(some, lengths.new_zeros(()))
        gain = (flat / own.sqrt().where(own > 0, one) - 1).where(own > 0, lengths.new_zeros(()))
        change = (gain.square() * own + 2 * gain * cross + delta).clamp_min(0)
        return Alignment(cosine=cosine, gap=gap, change=change, magnitude=flat)


def _sums(weight: StoredRows, kind: str, before: Factors, after: Factors) -> tuple[Tensor, ...]:
    """Returns ‖d‖², ⟨d, δ⟩, ‖δ‖², ‖ΔW‖² and ⟨d, ΔW⟩ for each output, with δ = ΔW' − ΔW."""
    import torch

    parts: list[tuple[Tensor, ...]] = []
    axis = 0 if kind in TRANSPOSED else 1
    for first, block in weight.blocks():
        nothing = block.new_zeros(()).expand(block.shape)
        delta = _add(nothing, kind, before, first)
        d = block + delta
        step = _add(nothing, kind, after, first) - delta
        pairs = ((d, d), (d, step), (step, step), (delta, delta), (d, delta))
        parts.append(tuple((left * right).sum(dim=axis) for left, right in pairs))
    join = torch.cat if axis else _sum
    return tuple(join(list(column)) for column in zip(*parts, strict=True))


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
