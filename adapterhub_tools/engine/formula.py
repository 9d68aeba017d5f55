"""From a step to the formula of its result: loads the factors and asks the methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import load_whole, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.combined import combined_formula
from adapterhub_tools.engine.factor_rows import FactorRows
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.weight import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.line_gains import LineInverse
    from adapterhub_tools.model.plan import ByteRange, Step, Term
    from adapterhub_tools.model.protocols import OpenSource


def formula(step: Step, open_source: Callable[[str], OpenSource]) -> Expression:
    """Returns the formula of a step's result.

    A step whose methods all add deltas that do not depend on the base is their sum; otherwise it has one
    term, and its method makes the formula; or its terms are combined, see engine/combined.py.

    Raises:
        FormatError: a factor is not finite.
    """
    if step.combination is None:
        return _of_terms(step, step.terms, open_source)
    return combined_formula(
        step, lambda terms: _of_terms(step, terms, open_source), _reader(step.start, open_source)
    )


def _of_terms(step: Step, terms: tuple[Term, ...], open_source: Callable[[str], OpenSource]) -> Expression:
    rows, _ = matrix_shape(step.output.shape)
    deltas = []
    for term in terms:
        method = registry.load("methods", term.method).IMPLEMENTATION.from_hparams(term.hparams)
        factors = _factors(term, method, open_source)
        weight = _weight(step, term, open_source)
        if not method.additive:
            expression: Expression = method.expression(factors, weight)
            return expression
        deltas.append(method.delta(factors, weight))
    return DeltaSum(deltas, rows)


def line_inverse(step: Step, open_source: Callable[[str], OpenSource]) -> LineInverse:
    """Returns how a step of one term is taken back with a gain for each row or column.

    Args:
        step: one of whose method ``has_line_inverse`` says so; its start is not read.
        open_source: uri -> the open file.

    Raises:
        FormatError: a factor is not finite.
    """
    (term,) = step.terms
    method = registry.load("methods", term.method).IMPLEMENTATION.from_hparams(term.hparams)
    found: LineInverse = method.line_inverse(
        _factors(term, method, open_source), _weight(step, term, open_source)
    )
    return found


def _factors(term: Term, method: Any, open_source: Callable[[str], OpenSource]) -> dict[str, Any]:
    places, by_rows = getattr(method, "place_roles", ()), getattr(method, "row_roles", ())
    return {
        role: FactorRows(open_source(item.uri), item)
        if role in by_rows
        else load_whole(open_source(item.uri), item, places=role in places)
        for role, item in term.factors.items()
    }


def _weight(step: Step, term: Term, open_source: Callable[[str], OpenSource]) -> Weight:
    place = term.placement
    return Weight(
        kind=term.hparams["kind"],
        shape=step.start.spec.shape,
        read_rows=_reader(step.start, open_source),
        row=place.rows[0] if place.rows else 0,
        column=place.columns[0] if place.columns else 0,
    )


def _reader(start: ByteRange, open_source: Callable[[str], OpenSource]) -> Callable[[int, int], Tensor]:
    _, columns = matrix_shape(start.spec.shape)
    dtype = torch_dtype(start.spec.dtype)

    def read_rows(first: int, count: int) -> Tensor:
        size = columns * dtype.itemsize
        raw = torch.empty(count * size, dtype=torch.uint8)
        open_source(start.uri).read_into(memory_of(raw), start.offset + first * size)
        return raw.view(dtype).view(count, columns).double()

    return read_rows
