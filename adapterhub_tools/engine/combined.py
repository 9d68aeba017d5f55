"""The formula of a step whose terms belong to several adapters that are combined, not added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import matrix_shape
from adapterhub_tools.linalg.combination import gram_of_rows
from adapterhub_tools.linalg.combined_rows import CombinedRows, DeltaInput, WeightedSum
from adapterhub_tools.linalg.combined_sum import KEPT_ELEMENTS, CombinedSum
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.order_statistics import KEPT_VALUES
from adapterhub_tools.linalg.panels import PANEL_ELEMENTS, ExpressionPanels, TermPanels

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.combined_rows import ElementWise
    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.panels import Panels
    from adapterhub_tools.model.combination import CombinedInput
    from adapterhub_tools.model.plan import Step, Term

_WORKING_PANELS = 4
"""Panels of signs, counts, masks and random numbers."""

OfTerms = Callable[[tuple["Term", ...]], "Expression"]
ReadRows = Callable[[int, int], "Tensor"]


def panel_bytes(step: Step) -> int:
    """Estimates the memory that a step's combination needs: its panels, those kept, and selected values."""
    if step.combination is None:
        return 0
    panels = len(step.combination.inputs) + _WORKING_PANELS
    return 8 * (panels * PANEL_ELEMENTS + KEPT_ELEMENTS + KEPT_VALUES // 2)


def combined_formula(step: Step, of_terms: OfTerms, read_rows: ReadRows) -> Expression:
    """Returns w + D, with D what the step's combination makes of the deltas of its inputs.

    A method whose result is a sum c₁·ΔW₁ + c₂·ΔW₂ + … stays one, and is rounded from the exact value, where
    no delta depends on the weight.

    Args:
        step: the step, with a combination.
        of_terms: makes the expression of some of its terms.
        read_rows: (first row, count) -> the start values in float64.
    """
    shape = matrix_shape(step.output.shape)
    if step.combination is None:
        raise ValueError(f"{step.output.name} has no combination")
    made = registry.load("combine", step.combination.method).IMPLEMENTATION
    method = made(**step.combination.hparams)
    groups = _groups(step, step.combination.inputs)
    if hasattr(method, "coefficients"):
        groups = _weighted(method, groups, of_terms, read_rows, shape)
        terms = tuple(term for _, own in groups for term in own)
        if all(_is_additive(term) for term in terms):
            return of_terms(terms)
        method = WeightedSum()
    rows = _rows(method, groups, step.combination.name, of_terms, read_rows, shape)
    return DeltaSum((), shape[0]) if rows is None else CombinedSum(rows)


def _groups(step: Step, inputs: Sequence[CombinedInput]) -> list[tuple[CombinedInput, tuple[Term, ...]]]:
    groups, at = [], 0
    for item in inputs:
        groups.append((item, step.terms[at : at + item.terms]))
        at += item.terms
    return groups


def _rows(
    method: ElementWise,
    groups: Sequence[tuple[CombinedInput, tuple[Term, ...]]],
    name: str,
    of_terms: OfTerms,
    read_rows: ReadRows,
    shape: tuple[int, int],
) -> CombinedRows | None:
    """Returns the combined delta; None where every delta is exactly zero."""
    inputs = []
    for item, terms in groups:
        delta = _panels(terms, of_terms, read_rows, shape)
        if delta is not None:
            inputs.append(DeltaInput(delta=delta, key=item.key.encode(), weight=item.weight))
    return CombinedRows(method, inputs, name) if inputs else None


def _panels(
    terms: tuple[Term, ...], of_terms: OfTerms, read_rows: ReadRows, shape: tuple[int, int]
) -> Panels | None:
    """Returns what some terms change; None where that is exactly zero."""
    if not terms:
        return None
    expression = of_terms(terms)
    if isinstance(expression, DeltaSum):
        return None if expression.identity else TermPanels(expression.terms, shape)
    return ExpressionPanels(expression, read_rows, shape)


def _weighted(
    method: Any,
    groups: Sequence[tuple[CombinedInput, tuple[Term, ...]]],
    of_terms: OfTerms,
    read_rows: ReadRows,
    shape: tuple[int, int],
) -> list[tuple[CombinedInput, tuple[Term, ...]]]:
    """Returns the inputs with their coefficients in the multipliers of their terms."""

    def inner() -> Tensor:
        return _inner_products([_panels(own, of_terms, read_rows, shape) for _, own in groups])

    factors = method.coefficients(tuple(item.weight for item, _ in groups), inner)
    return [
        (item, tuple(_times(term, factor) for term in own))
        for (item, own), factor in zip(groups, factors, strict=True)
    ]


def _times(term: Term, factor: float) -> Term:
    if factor == 1.0:
        return term
    multiplier = term.hparams.get("multiplier", 1.0) * factor
    return replace(term, hparams={**term.hparams, "multiplier": multiplier})


def _is_additive(term: Term) -> bool:
    additive: bool = registry.load("methods", term.method).IMPLEMENTATION.additive
    return additive


def _inner_products(deltas: Sequence[Panels | None]) -> Tensor:
    """Returns the inner products of deltas; those of None are 0.

    Shapes: (inputs, inputs).
    Dtype:  float64.
    """
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    present = [number for number, delta in enumerate(deltas) if delta is not None]
    if present:
        index = torch.tensor(present)
        total[index[:, None], index] = gram_of_rows([delta for delta in deltas if delta is not None])
    return total
