"""Electing one sign for each element of several deltas, and averaging those that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from adapterhub_tools.linalg.formats import AnyArray

if TYPE_CHECKING:
    from torch import Tensor

MAJORITIES = ("total", "frequency")
"""By the sum of the values, or by how many of each sign there are."""


class SignElection:
    """The elect and merge steps of TIES, with buffers that are reused from panel to panel.

    Args:
        majority: one of MAJORITIES.
    """

    def __init__(self, majority: str) -> None:
        """Allocates nothing yet."""
        if majority not in MAJORITIES:
            raise ValueError(f"majority_sign must be one of {', '.join(MAJORITIES)}, not {majority!r}")
        self._majority = majority
        self._sign = torch.empty(0, dtype=torch.float64)
        self._other = torch.empty(0, dtype=torch.float64)
        self._count: AnyArray = np.empty(0, dtype=np.uint8)
        self._flags = np.empty(0, dtype=np.bool_)

    def mean(self, deltas: list[Tensor]) -> Tensor:
        """Returns for each element the mean of the non-zero values that have the elected sign.

        γ = sgn(Σ τ_t), or sgn(Σ sgn(τ_t)) for ``"frequency"``; A = {t: sgn(τ_t) = γ}; the result is
        Σ_{t∈A} τ_t / |A|, and 0 where γ = 0: where all are 0, or the two sides are equal.

        Shapes: each (n, columns), and so is the result.
        Dtype:  float64.
        Source: Yadav et al. 2023, arXiv:2306.01708, §3, steps 2 and 3.

        Args:
            deltas: τ_t, at least one; they are overwritten, and the result may be one of them.
        """
        if len(deltas) == 1:
            return deltas[0]
        sign, other, count, flags = self._buffers(deltas[0], len(deltas))
        if self._majority == "total":
            torch.add(deltas[0], deltas[1], out=sign)
            for delta in deltas[2:]:
                sign.add_(delta)
        else:
            torch.sign(deltas[0], out=sign)
            for delta in deltas[1:]:
                sign.add_(torch.sign(delta, out=other))
        sign.sign_()
        count.fill(0)
        for delta in deltas:
            # With the elected sign taken out, the values that have it are positive, and no others.
            delta.mul_(sign).clamp_min_(0.0)
            np.greater(delta.numpy(), 0.0, out=flags)
            np.add(count, flags.view(np.uint8), out=count)
        total = deltas[0]
        for delta in deltas[1:]:
            total.add_(delta)
        np.maximum(count, count.dtype.type(1), out=count)
        np.copyto(other.numpy(), count)
        return total.div_(other).mul_(sign)

    def _buffers(self, like: Tensor, voters: int) -> tuple[Tensor, Tensor, AnyArray, AnyArray]:
        size = like.numel()
        if self._sign.numel() < size:
            self._sign, self._other = torch.empty(2, size, dtype=torch.float64)
            self._count = np.empty(size, dtype=np.uint8 if voters < 256 else np.uint32)
            self._flags = np.empty(size, dtype=np.bool_)
        shape = tuple(like.shape)
        return (
            self._sign[:size].view(shape),
            self._other[:size].view(shape),
            self._count[:size].reshape(shape),
            self._flags[:size].reshape(shape),
        )
