"""The sum of products of two factors as one product: the factors side by side, or its best approximation."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import torch_dtype
from adapterhub_tools.linalg.casting import cast
from adapterhub_tools.linalg.factored_sum import (
    ONE,
    ScaledProduct,
    common_scale,
    gram,
    is_shift,
    ratio,
    sum_norm,
)
from adapterhub_tools.linalg.factored_svd import FactoredSVD, product_distance, tail_norm
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.ops.combine_modules import Joint
from adapterhub_tools.ops.combine_work import Combined, Work, nbytes_of
from adapterhub_tools.ops.low_rank import RULES, alpha_for
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.to_lora import shaped

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.surd import Surd

_NOISE = 1e-13
"""A sum below this share of its terms is what rounding left of them."""


def combine_products(work: Work, joint: Joint, rank: int | None) -> Combined:
    """Returns the module of a sum of products.

    Without a rank and a policy the factors stand side by side: A as stored, B multiplied by c_i·s_i/s, with
    the s that leaves most of them bit for bit. Otherwise the sum's best approximation (Eckart & Young 1936)
    from the factors alone, balanced, with a scale of 1.

    Args:
        work: the combination.
        joint: the module.
        rank: its rank, if it is known.
    """
    terms = work.terms(joint)
    if not terms:
        return Combined(reason="left out: every weight of it is 0, or its deltas are exactly zero")
    return _side_by_side(work, joint, terms) if work.exact else _truncated(work, joint, terms, rank)


def spectrum(work: Work, joint: Joint) -> list[float]:
    """Returns the singular values of a sum of products, descending; empty where nothing is left of it."""
    terms = work.terms(joint)
    work.progress.advance(nbytes_of(joint))
    return [float(value) for value in FactoredSVD(*_joined(terms)).values] if terms else []


def _side_by_side(work: Work, joint: Joint, terms: Sequence[ScaledProduct]) -> Combined:
    rank = sum(term.rank for term in terms)
    scale = common_scale(terms, lambda s: alpha_for(s, rank, RULES[0]) is not None)
    label = f"{joint.path}.B"
    lefts = [stored_factor(work.dtype, term.left, ratio(term.scale, scale), label) for term in terms]
    rights = [stored_factor(work.dtype, term.right, ONE, f"{joint.path}.A") for term in terms]
    left = torch.cat([stored for stored, _ in lefts], dim=1)
    right = torch.cat([stored for stored, _ in rights], dim=0)
    size = float(scale)
    parts = sum(sqrt(max(0.0, float(gram([term])[0, 0]))) for term in terms)
    norm = sum_norm(left, right, parts / size) * size
    if any(exact is not None for _, exact in rights):
        off = product_distance(left * size, right, *_joined(terms))
    else:
        pairs = zip(lefts, rights, strict=True)
        changed = [(b.double() - exact, a) for (b, exact), (a, _) in pairs if exact is not None]
        off = 0.0
        if changed:
            b, a = torch.cat([b for b, _ in changed], dim=1), torch.cat([a for _, a in changed], dim=0)
            off = sum_norm(b, a, 0.0) * size
    return _finished(work, joint, left, right, alpha_for(scale, rank, RULES[0]), (norm, parts, 0.0, off), ())


def _truncated(work: Work, joint: Joint, terms: Sequence[ScaledProduct], rank: int | None) -> Combined:
    both = _joined(terms)
    factored = FactoredSVD(*both)
    values = factored.values
    policy = work.options.policy
    if rank is None:
        rank = int(values.shape[0]) if policy is None or policy.name == "rank" else policy.rank_of(values)
    rank = max(1, min(rank, int(values.shape[0])))
    left, right = factored.leading(rank).balanced()
    stored_left, stored_right = cast(left, work.dtype), cast(right, work.dtype)
    rounding = product_distance(left, right, stored_left, stored_right)
    truncation = tail_norm(values, rank)
    parts = sum(sqrt(max(0.0, float(gram([term])[0, 0]))) for term in terms)
    figures = (float(values.norm()), parts, truncation, rounding)
    spectrum_of = tuple(float(value) for value in values)
    return _finished(work, joint, stored_left, stored_right, None, figures, spectrum_of)


def _finished(
    work: Work,
    joint: Joint,
    left: Tensor,
    right: Tensor,
    alpha: float | None,
    figures: tuple[float, float, float, float],
    values: tuple[float, ...],
) -> Combined:
    """Takes the factors along, as they are stored now.

    Args:
        work: the combination.
        joint: the module.
        left: (out, k).
        right: (k, in·…).
        alpha: such that alpha / k is the scale; None for a scale of 1.
        figures: the norm, the sum of the terms' norms, and the errors of truncation and of rounding.
        values: the singular values, if they were computed.
    """
    norm, parts, truncation, rounding = figures
    rank = int(right.shape[0])
    if norm == 0.0:
        return Combined(reason="left out: the combined delta is exactly zero")
    b, a = shaped(left, right, joint.kind, joint.weight_shape)
    module = TargetModule(
        path=joint.path,
        method="lora",
        kind=joint.kind,
        hparams={"rank": rank, "alpha": float(rank) if alpha is None else alpha, "scaling": RULES[0]},
        factors={
            "A": work.tensors.put_stored(a, f"{joint.path}.A"),
            "B": work.tensors.put_stored(b, f"{joint.path}.B"),
        },
        base_shape=joint.weight_shape if joint.members[0].target is not None else None,
    )
    report = ModuleReport(
        path=joint.path,
        kind=joint.kind,
        rank_before=None,
        rank=rank,
        norm=norm,
        energy=max(0.0, 1.0 - (truncation / norm) ** 2),
        error=sqrt(truncation**2 + rounding**2) / norm,
        singular_values=values,
    )
    notes: tuple[str, ...] = ()
    if norm < _NOISE * parts:
        notes = (f"{joint.path}: the deltas cancel to {norm / parts:.1g} of themselves, which is rounding",)
    return Combined(module=module, report=report, notes=notes)


def stored_factor(name: str, values: Tensor, factor: Surd, label: str) -> tuple[Tensor, Tensor | None]:
    """Returns values times a factor in a dtype, and in float64 where that is not exact.

    Args:
        name: the dtype, as in safetensors.
        values: any float.
        factor: what they are multiplied by.
        label: what to call them, for messages.
    """
    dtype = torch_dtype(name)
    number = float(factor)
    if is_shift(factor):
        found = values.to(dtype) if number == 1.0 else values.to(dtype) * number
        wide = values.dtype.itemsize <= dtype.itemsize and {values.dtype, dtype} != _HALVES
        if (wide and number == 1.0) or torch.equal(found.double(), values.double() * number):
            return found, None
    exact = values.double() * number
    return cast(exact, name, name=label), exact


def _joined(terms: Sequence[ScaledProduct]) -> tuple[Tensor, Tensor]:
    """Returns [c_1·L_1, …] and [R_1; …] in float64."""
    left = torch.cat([term.left.double() * float(term.scale) for term in terms], dim=1)
    return left, torch.cat([term.right.double() for term in terms], dim=0)


_HALVES = {torch.bfloat16, torch.float16}
