"""LoHa: W' = W + s·(A₁·B₁) ⊙ (A₂·B₂), with s = alpha / rank.

Source: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara), prop. 1, and prop. 3 for the Tucker form of
convolutions; names and scale as in PEFT (peft/tuners/loha/layer.py, ``get_delta_weight``).
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

_PARTS = ("w1", "w2")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoHa(RankAndAlpha):
    """The hyperparameters of one LoHa module."""

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the rank, with each other and with the base weight's.

        Args:
            factors: ``"w1_a"`` and ``"w2_a"`` (out, rank), ``"w1_b"`` and ``"w2_b"`` (rank, in·kernel); in
                the Tucker form (rank, out), (rank, in), and ``"t1"`` and ``"t2"`` (rank, rank, kernel).
            kind: the module's kind, see model/adapter.py.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        if kind not in KINDS:
            return (wrong_kind(module, kind, KINDS),)
        names = [f"{part}_{side}" for part in _PARTS for side in "ab"]
        tucker = "t1" in factors or "t2" in factors
        absent = [name for name in names + ["t1", "t2"] * tucker if name not in factors]
        if absent:
            spec = next(iter(factors.values()))
            return (wrong_factor(module, spec, f"{', '.join(absent)} beside it"),)
        problems = []
        expected = _shapes(self.rank, base.shape, tucker=tucker)
        for name, wanted in expected.items():
            spec = factors[name]
            short = name[-1] if name.startswith("w") else ""
            fixed = 0 if tucker or short == "b" else 1
            if len(spec.shape) < 2 or spec.shape[fixed] != self.rank:
                problems.append(wrong_factor(module, spec, f"rank {self.rank}, as the config says"))
            elif spec.shape != wanted and prod(spec.shape) != prod(wanted):
                problems.extend(misfit(module, base, _product(factors, tucker=tucker)))
                break
            elif spec.shape != wanted:
                problems.append(wrong_factor(module, spec, str(list(wanted))))
        return tuple(problems)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> PairTerm:
        """Returns the delta s·(A₁·B₁) ⊙ (A₂·B₂).

        Shapes: see ``check``; the delta is (out, in·kernel).
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes per value of the factors, and two blocks.
        """
        from adapterhub_tools.linalg.product_terms import hadamard

        first, second = _product_of("1", factors), _product_of("2", factors)
        return hadamard(first, second, self.scale, row=weight.row, column=weight.column)


def _shapes(rank: int, base: tuple[int, ...], *, tucker: bool) -> dict[str, tuple[int, ...]]:
    if not tucker:
        inner = prod(base[1:])
        return {
            f"{p}_{s}": shape for p in _PARTS for s, shape in (("a", (base[0], rank)), ("b", (rank, inner)))
        }
    kernel = (*base[2:], 1) if len(base) == 3 else base[2:]
    found: dict[str, tuple[int, ...]] = {}
    for number, part in enumerate(_PARTS, 1):
        found[f"{part}_a"], found[f"{part}_b"] = (rank, base[0]), (rank, base[1])
        found[f"t{number}"] = (rank, rank, *kernel)
    return found


def _product(factors: Mapping[str, TensorSpec], *, tucker: bool) -> tuple[int, ...]:
    a, b = factors["w1_a"].shape, factors["w1_b"].shape
    return (a[1], b[1], *factors["t1"].shape[2:]) if tucker else (a[0], b[1])


def _product_of(number: str, factors: Mapping[str, Tensor]) -> Product:
    from adapterhub_tools.linalg.products import product_of

    return product_of(factors[f"w{number}_a"], factors[f"w{number}_b"], factors.get(f"t{number}"))


IMPLEMENTATION = LoHa
