"""VB-LoRA: W' = W + B·A, every piece of A and B a mixture of a few vectors of a bank that all modules share.

Source: Li, Han and Ji 2024, arXiv:2405.15179; peft/tuners/vblora/layer.py, ``_get_low_rank_matrix``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import FormatError, Problem
from adapterhub_tools.linalg.surd import scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm


@dataclass(frozen=True, slots=True, kw_only=True)
class VBLoRA:
    """The hyperparameters of a VB-LoRA module.

    The relative error of a mixture is at most (2·k + 8)·2⁻⁵³ of Σ|weights·vectors|: that of the softmax.

    Attributes:
        topk: k, how many vectors a mixture has.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    place_roles: ClassVar[tuple[str, ...]] = ("logits_A_topk_indices", "logits_B_topk_indices")
    topk: int
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> VBLoRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(topk=read.integer(hparams, "topk"), multiplier=hparams.get("multiplier", 1.0))

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with each other and with the base weight's.

        Args:
            factors: ``"vector_bank"`` (vectors, length), shared; ``"logits_A"`` (rank, in / length, vectors)
                and ``"logits_B"`` (out / length, rank, vectors), or for each the k largest:
                ``"…_topk_indices"`` (…, k) and ``"…_topk_weights"`` (…, k − 1), as they sum to 1.
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        bank = factors.get("vector_bank")
        shapes: dict[str, tuple[int, ...]] = {}
        for side in ("A", "B"):
            last = {f"logits_{side}": bank.shape[0] if bank else 0}
            if f"logits_{side}" not in factors:
                last = {
                    f"logits_{side}_topk_indices": self.topk,
                    f"logits_{side}_topk_weights": self.topk - 1,
                }
            for role, size in last.items():
                spec = factors.get(role)
                if bank is None or spec is None:
                    anything = next(iter(factors.values()))
                    return (wrong_factor(module, anything, f"{role} and the vector bank beside it"),)
                if len(spec.shape) != 3 or spec.shape[2] != size or size > bank.shape[0]:
                    return (wrong_factor(module, spec, f"three axes, the last of {size}"),)
                if shapes.setdefault(side, spec.shape[:2]) != spec.shape[:2]:
                    return (wrong_factor(module, spec, f"[{shapes[side][0]}, {shapes[side][1]}, {size}]"),)
        if bank is None or len(bank.shape) != 2 or shapes["A"][0] != shapes["B"][1]:
            return (wrong_factor(module, next(iter(factors.values())), "one rank for A and B"),)
        length = bank.shape[1]
        return misfit_matrix(module, base, kind, shapes["B"][0] * length, shapes["A"][1] * length)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta B·A as a product of float64 factors in the stored layout.

        Shapes: see ``check``; the delta is (out, in), or (in, out) for ``conv1d``.
        Memory: 8·(k + 1) bytes per value of A and B.

        Raises:
            FormatError: an index is beyond the bank.
        """
        from adapterhub_tools.linalg.low_rank import LowRankTerm

        bank = factors["vector_bank"].double()
        a = self._mixture(factors, "logits_A", bank)
        b = self._mixture(factors, "logits_B", bank)
        a = a.reshape(a.shape[0], -1)
        b = b.transpose(1, 2).reshape(-1, b.shape[1])
        left, right = (a.t(), b.t()) if weight.transposed else (b, a)
        return LowRankTerm(
            left=left.contiguous(),
            right=right.contiguous(),
            scale=scaling_of(1.0, 1, "alpha", self.multiplier),
            exact_products=False,
            row=weight.row,
            column=weight.column,
        )

    def _mixture(self, factors: Mapping[str, Tensor], role: str, bank: Tensor) -> Tensor:
        """Returns Σ weight · vector for each place, shape (…, length)."""
        import torch

        if role in factors:
            values, index = factors[role].topk(self.topk, dim=-1)
            weights = torch.softmax(values.double(), dim=-1)
        else:
            index = factors[f"{role}_topk_indices"].long()
            if int(index.min()) < 0 or int(index.max()) >= bank.shape[0]:
                raise FormatError.of(
                    "place",
                    f"an index is {int(index.max())}, but the bank has {bank.shape[0]} vectors.",
                    loc=f"vblora_{role}_topk_indices",
                    remedy="The file is damaged: get it again.",
                )
            stored = factors[f"{role}_topk_weights"].double()
            weights = torch.cat((stored, 1 - stored.sum(dim=-1, keepdim=True)), dim=-1)
        return (weights[..., None] * bank[index]).sum(dim=-2)


IMPLEMENTATION = VBLoRA
