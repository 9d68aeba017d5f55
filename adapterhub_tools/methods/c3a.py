"""C3A: W' = W + C / in, with C made of circulant blocks, each given by one vector.

Source: Chen et al. 2024, arXiv:2407.19342; peft/tuners/c3a/utils.py, ``get_circulant_fast``, which gets
the same blocks by Fourier transforms. Block (m, j) holds k[m, j, (q − p) mod b] at row p and column q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import IntArray
    from adapterhub_tools.linalg.stored_term import TiledTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class C3A:
    """A C3A module; its block size is that of the kernel.

    Attributes:
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "exact"
    additive: ClassVar[bool] = True
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> C3A:
        """Reads the multiplier; what else enters the maths is in the tensors."""
        return cls(multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the kernel's shape with the base weight's.

        Args:
            factors: ``"kernel"`` (out / b, in / b, b).
            kind: ``"linear"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        kernel = factors["kernel"]
        if kind != "linear":
            return (wrong_kind(module, kind, ("linear",)),)
        if len(kernel.shape) != 3:
            return (wrong_factor(module, kernel, "three axes"),)
        up, down, size = kernel.shape
        return misfit_matrix(module, base, kind, up * size, down * size)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> TiledTerm:
        """Returns the delta C / in.

        Shapes: kernel (m, n, b) gives (m·b, n·b).
        Dtype:  any float in; every value of the delta is a stored one times an exact scale.
        Memory: 16 bytes per value of the kernel, and one block of rows.
        """
        import torch

        from adapterhub_tools.linalg.stored_term import TiledTerm

        kernel = factors["kernel"].double().contiguous()
        up, down, size = (int(n) for n in kernel.shape)
        # Window w of the doubled vector is it rotated by w; row p of a block is the window that begins b − p.
        windows = torch.cat((kernel, kernel), dim=2).unfold(2, size, 1)

        def block(first: int, count: int) -> Tensor:
            rows = torch.arange(first, first + count)
            return windows[rows // size, :, size - rows % size].reshape(count, down * size)

        def place(rows: IntArray, columns: IntArray) -> IntArray:
            blocks = (rows // size) * down + columns // size
            return blocks * size + (columns - rows) % size

        return TiledTerm(
            values=kernel.flatten(),
            block=block,
            place=place,
            height=up * size,
            width=down * size,
            scale=Surd(coefficient=Fraction(self.multiplier) / (down * size)),
            row=weight.row,
            column=weight.column,
        )


IMPLEMENTATION = C3A
