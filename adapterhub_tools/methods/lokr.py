"""LoKr: W' = W + s·C ⊗ D, with s = alpha / rank; C and D are stored whole or as products.

Source: Yeh et al. 2023, arXiv:2309.14859 (LyCORIS), §3.1; names, scale and the order of axes as in PEFT
(peft/tuners/lokr/layer.py, ``get_delta_weight``, ``make_kron``). PEFT's scale is alpha / rank in every case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods._lycoris import KINDS, RankAndAlpha
from adapterhub_tools.model.misfit import misfit, wrong_factor, wrong_kind
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.product_terms import PairTerm
    from adapterhub_tools.linalg.products import Product


@dataclass(frozen=True, slots=True, kw_only=True)
class LoKr(RankAndAlpha):
    """The hyperparameters of one LoKr module."""

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the rank, with each other and with the base weight's.

        Args:
            factors: C as ``"w1"`` (a, c), or ``"w1_a"`` (a, rank) and ``"w1_b"`` (rank, c); D as ``"w2"``
                (b, d) or (b, d, kernel…), or ``"w2_a"`` (b, rank) and ``"w2_b"`` (rank, d·kernel), or in the
                Tucker form (rank, b), (rank, d) and ``"t2"`` (rank, rank, kernel…).
            kind: the module's kind, see model/adapter.py.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        if kind not in KINDS:
            return (wrong_kind(module, kind, KINDS),)
        first, second = _shape_of("w1", factors), _shape_of("w2", factors)
        if first is None or second is None:
            spec = next(iter(factors.values()))
            return (wrong_factor(module, spec, "both Kronecker factors, each whole or as a product"),)
        for name, spec in factors.items():
            tucker = name.startswith(("w2", "t2")) and "t2" in factors
            if name not in ("w1", "w2") and spec.shape[int(name.endswith("_a") and not tucker)] != self.rank:
                return (wrong_factor(module, spec, f"rank {self.rank}, as the config says"),)
        rows, columns = first[0] * second[0], first[1] * prod(second[1:])
        if (rows, columns) == (base.shape[0], prod(base.shape[1:])):
            return ()
        return misfit(module, base, (rows, columns))

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> PairTerm:
        """Returns the delta s·C ⊗ D in the order of axes that PEFT gives it.

        Shapes: (a·b, c·d·kernel). Of a one-axis convolution with a whole D, ``torch.kron`` aligns C with
        D's last two axes, and the reshaped result is what was trained: see ``shifted_kronecker``.
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes per value of the factors, and one block.
        """
        from adapterhub_tools.linalg.product_terms import kronecker, shifted_kronecker

        first, second = _product_of("w1", factors), _product_of("w2", factors)
        whole = factors.get("w2")
        if whole is not None and whole.ndim == 3:
            shape = tuple(whole.shape)
            return shifted_kronecker(first, second, shape, self.scale, row=weight.row, column=weight.column)
        return kronecker(first, second, self.scale, row=weight.row, column=weight.column)


def _shape_of(part: str, factors: Mapping[str, TensorSpec]) -> tuple[int, ...] | None:
    """Returns the shape of C or D, or None if its factors are incomplete or have too few axes."""
    whole, a, b = (factors.get(name) for name in (part, f"{part}_a", f"{part}_b"))
    if whole is not None:
        return whole.shape if len(whole.shape) >= 2 and a is None and b is None else None
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return None
    core = factors.get("t2") if part == "w2" else None
    if core is None:
        return (a.shape[0], b.shape[1])
    return (a.shape[1], b.shape[1], *core.shape[2:]) if len(core.shape) >= 3 else None


def _product_of(part: str, factors: Mapping[str, Tensor]) -> Product:
    from adapterhub_tools.linalg.products import StoredMatrix, product_of

    if part in factors:
        return StoredMatrix(values=factors[part].double().flatten(1).contiguous())
    core = factors.get("t2") if part == "w2" else None
    return product_of(factors[f"{part}_a"], factors[f"{part}_b"], core)


IMPLEMENTATION = LoKr
