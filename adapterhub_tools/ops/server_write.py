"""Writes modules for a server: joined, split, padded, multiplied; and measures whether that was exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools.linalg.surd import Surd
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.tensor import DTYPE_NAMES
from adapterhub_tools.ops.low_rank import RULES, Loader, Tensors, factor_shapes, scale_of, with_scale
from adapterhub_tools.ops.server_layout import Origin, Piece
from adapterhub_tools.ops.server_report import RewrittenModule
from adapterhub_tools.ops.server_scales import ONE, is_power_of_two, quotient

if TYPE_CHECKING:
    from torch import Tensor

_MANTISSA = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a module is to be.

    Attributes:
        rank: its rank.
        alpha: its alpha.
        rule: how they make its scale.
    """

    rank: int
    alpha: float
    rule: str

    @property
    def scale(self) -> Surd:
        """The scale that a reader finds."""
        rational = Fraction(self.alpha) / self.rank
        return Surd(coefficient=rational) if self.rule == RULES[0] else Surd.of(rational, self.rank)


def piece_scale(piece: Piece) -> Surd:
    """Returns the scale of a module that is made of others: that of the first, which keeps its B then."""
    return scale_of(piece.origins[0].module)


def piece_rank(piece: Piece) -> int:
    """Returns the rank of a module: the sum of those that it is made of."""
    return sum(int(origin.module.hparams["rank"]) for origin in piece.origins)


def write_piece(
    piece: Piece, target: Target, dtype: str | None, tensors: Tensors, loader: Loader
) -> tuple[TargetModule, RewrittenModule | None]:
    """Writes one module, and says what became of it; None if its tensors are the same bytes.

    A' has the rows of every A, then zeros; B' has every B in its own rows and columns, times s/s', with s the
    scale that the B had and s' the one that a reader finds.

    Args:
        piece: where it comes from.
        target: rank, alpha and rule that it gets.
        dtype: the dtype of factors that are computed; None keeps theirs.
        tensors: takes what is written.
        loader: reads the adapter.

    Raises:
        FormatError: a factor holds a NaN or an infinity.
        LossyError: a value is beyond the dtype.
    """
    module = piece.origins[0].module
    hparams = with_scale(module, target.rank, target.alpha, target.rule)
    if module.kind == "expert":
        tensors.keep_module(loader, module)
        return module, None
    factors = [quotient(scale_of(origin.module), target.scale) for origin in piece.origins]
    if (
        piece.fused is None
        and dtype is None
        and target.rank == module.hparams["rank"]
        and set(factors) == {ONE}
    ):
        tensors.keep_module(loader, module)
        return _module(module, piece, hparams, dict(module.factors)), None
    computed = _Computed(piece, target.rank, factors, loader)
    kind = DTYPE_NAMES[dtype] if dtype is not None else computed.dtype
    shaped = (computed.b, computed.a)
    if piece.fused is None:
        shaped = factor_shapes(module, *shaped)
    written: dict[str, Any] = {}
    stored = {}
    for role, values in zip(("B", "A"), shaped, strict=True):
        name = f"{piece.path}.{role}"
        written[role], stored[role] = tensors.put(values, kind, name)
    written |= {
        role: tensors.keep(loader, spec) for role, spec in module.factors.items() if role not in written
    }
    exact = computed.exact and all(
        bool(torch.equal(stored[role].double(), values))
        for role, values in zip(("B", "A"), shaped, strict=True)
    )
    report = RewrittenModule(
        path=piece.path,
        rank_before=None if piece.fused else int(module.hparams["rank"]),
        rank=target.rank,
        exact=exact,
        error=0.0
        if exact
        else computed.error(stored["B"].double().flatten(1), stored["A"].double().flatten(1)),
        how="; ".join(part for part in (piece.how, *computed.done) if part),
    )
    return _module(module, piece, hparams, written), report


def _module(
    module: TargetModule, piece: Piece, hparams: dict[str, Any], factors: Mapping[str, Any]
) -> TargetModule:
    return TargetModule(
        path=piece.path,
        method=module.method,
        kind=module.kind,
        hparams=hparams,
        factors=dict(factors),
        base_shape=module.base_shape if piece.fused is None else None,
    )


class _Computed:
    """The factors of one written module, in float64."""

    def __init__(self, piece: Piece, rank: int, factors: Sequence[Surd], loader: Loader) -> None:
        self.exact = True
        self.done: list[str] = []
        kinds = set()
        column = 0
        a_parts: list[Tensor] = []
        placed: list[tuple[Origin, int, Tensor]] = []
        for origin, factor in zip(piece.origins, factors, strict=True):
            b, a = loader.product(origin.module)
            spec = origin.module.factors
            kinds |= {spec["A"].dtype, spec["B"].dtype}
            b = b[origin.first : None if origin.rows is None else origin.first + origin.rows]
            self.exact &= _product_is_exact(factor, spec["B"].dtype)
            placed.append((origin, column, b * float(factor)))
            a_parts.append(a)
            column += int(a.shape[0])
        self.a = torch.zeros(rank, a_parts[0].shape[1], dtype=torch.float64)
        self.a[:column] = torch.cat(a_parts)
        self.b = torch.zeros(piece.outputs, rank, dtype=torch.float64)
        for origin, at, b in placed:
            self.b[origin.at : origin.at + b.shape[0], at : at + b.shape[1]] = b
        # One dtype that holds them all: bfloat16 and float16 meet in float32.
        self.dtype = next(iter(kinds)) if len(kinds) == 1 else "F32" if "F64" not in kinds else "F64"
        if rank > column:
            self.done.append(f"zeros fill {column} up to {rank}")
        multiplied = [factor for factor in factors if factor != ONE]
        if multiplied:
            self.done.append(f"B times {float(multiplied[0]):g}" + " and others" * (len(set(multiplied)) > 1))

    def error(self, b: Tensor, a: Tensor) -> float:
        """Returns the relative Frobenius error of what was stored."""
        from adapterhub_tools.linalg.factored_svd import product_distance, product_norm

        norm = product_norm(self.b, self.a)
        return 0.0 if norm == 0 else product_distance(self.b, self.a, b, a) / norm


def _product_is_exact(factor: Surd, dtype: str) -> bool:
    """Tells whether every value of a dtype times a factor has at most the 53 bits of float64."""
    if is_power_of_two(factor):
        return True
    bottom = factor.coefficient.denominator
    if factor.radicand != 1 or bottom & (bottom - 1):
        return False
    top = abs(factor.coefficient.numerator)
    return (top // (top & -top)).bit_length() + _MANTISSA.get(dtype, 53) <= 53
