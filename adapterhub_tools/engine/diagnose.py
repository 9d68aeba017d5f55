"""Why a merged tensor is wrong: simple explanations, each tested; the first that fits is told.

See diagnose_data.py for what fitting means; where nothing fits, that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.check_points import RowCheck, Wrong, spacing
from adapterhub_tools.engine.check_tensor import Pair
from adapterhub_tools.engine.diagnose_data import FITS, Evidence, evidence, expected_delta, reapplied
from adapterhub_tools.engine.diagnose_factors import inside, permuted
from adapterhub_tools.engine.diagnose_scaled import dora_explained, ia3_explained, other_gains

if TYPE_CHECKING:
    from adapterhub_tools.model.plan import Term

_FEW = 0.001
_SHOWN = 8


def diagnose(pair: Pair, found: RowCheck | None, others: Sequence[Pair] = ()) -> str:
    """Returns the explanation of a wrong tensor, in words.

    Args:
        pair: the tensors.
        found: what the comparison gave, where every row was compared.
        others: further wrong tensors, with which this one may have been swapped.
    """
    data = evidence(pair)
    if not bool(torch.isfinite(data.merged).all()):
        return "it holds NaN or infinity"
    if torch.equal(data.base, data.merged):
        return "the adapter is not applied: it is the base's tensor"
    return (
        _single_weights(pair, data, found)
        or _unmerged_rows(data)
        or dora_explained(pair, data)
        or ia3_explained(pair, data)
        or _scaled(data, pair)
        or _transposed(data, pair)
        or _swapped(pair, data, others)
        or other_gains(pair, data)
        or inside(data, pair.products)
        or permuted(data, pair.products)
        or _applied_twice(pair, data)
        or "its difference from the base is not this adapter's delta: another adapter, or another base"
    )


def _single_weights(pair: Pair, data: Evidence, found: RowCheck | None) -> str:
    if found is not None:
        count, first = found.wrong, found.first
    elif data.whole:
        count, first = data.single_weights(pair.dtype, _SHOWN)
    else:
        return ""
    if not 0 < count <= max(8, _FEW * pair.rows * pair.columns):
        return ""
    if len({wrong.row for wrong in first}) == 1 and count > max(8, pair.columns // 4):
        return ""  # rather a row
    return f"{count} single weights differ: {'; '.join(_described(wrong, pair.dtype) for wrong in first[:3])}"


def _described(wrong: Wrong, dtype: str) -> str:
    bits = [_bits(value, dtype) for value in (wrong.found, wrong.expected)]
    flipped = " (one bit is flipped)" if bin(bits[0] ^ bits[1]).count("1") == 1 else ""
    return f"[{wrong.row}, {wrong.column}] is {wrong.found!r}, expected {wrong.expected!r}{flipped}"


def _bits(value: float, dtype: str) -> int:
    name = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    held = torch.tensor([value], dtype=getattr(torch, name))
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
    return int(held.view(kind)[0]) & ((1 << (8 * held.element_size())) - 1)


def _unmerged_rows(data: Evidence) -> str:
    same = (data.difference == 0).all(dim=1)
    # A row whose delta is below half a unit everywhere is right as it is.
    expected = (data.delta.abs() > data.unit).any(dim=1)
    missing = torch.nonzero(same & expected).reshape(-1).tolist()
    rest = ~(same & expected)
    if not missing or not bool(rest.any()):
        return ""
    misfit = ((data.difference - data.delta) / data.unit)[rest].square().mean() * 12
    if float(misfit) > FITS:
        return ""
    shown = ", ".join(str(data.rows[i]) for i in missing[:5])
    return f"{len(missing)} rows are not merged: {shown}{' and more' if len(missing) > 5 else ''}"


def _scaled(data: Evidence, pair: Pair) -> str:
    power = float((data.delta / data.unit).square().sum())
    if power == 0:
        return ""
    best = float((data.difference * data.delta / data.unit.square()).sum()) / power
    error = 1 / sqrt(12 * power)
    if not data.fits(best * data.delta) or abs(best - 1) <= 6 * error:
        return ""
    names = [(2.0, "the adapter is applied twice"), (-1.0, "the adapter is subtracted")]
    if len(pair.step.terms) == 1:
        names += _other_scalings(pair.step.terms[0])
    fitting = [text for factor, text in names if abs(best - factor) <= max(6 * error, 0.003 * abs(factor))]
    if fitting:
        return ", or ".join(fitting)
    return f"the scaling is wrong: the delta is multiplied by {best:.5g}"


def _other_scalings(term: Term) -> list[tuple[float, str]]:
    """Returns the factors on the delta that a known mistake about alpha gives."""
    if term.method not in ("lora", "loha", "lokr"):
        return []
    rank, alpha = term.hparams["rank"], term.hparams["alpha"]
    plain = term.hparams.get("scaling", "alpha/rank") == "alpha/rank"
    names = []
    if term.method == "lora" and plain:
        names.append((sqrt(rank), "the scaling is alpha/√rank, expected alpha/rank"))
    elif term.method == "lora":
        names.append((1 / sqrt(rank), "the scaling is alpha/rank, expected alpha/√rank"))
    if alpha:
        names.append(((rank if plain else sqrt(rank)) / alpha, "alpha is ignored: the scaling is 1"))
    return names


def _transposed(data: Evidence, pair: Pair) -> str:
    if not data.whole or data.delta.shape[0] != data.delta.shape[1]:
        return ""
    if data.fits(data.delta.t()):
        return "the delta is transposed"
    for product in pair.products[:1]:
        left, right = product.left, product.right
        if left.shape[0] == left.shape[1] and data.fits(product.scale * left.t() @ right):
            return "B is transposed"
    return ""


def _swapped(pair: Pair, data: Evidence, others: Sequence[Pair]) -> str:
    for other in others:
        if other is pair or (other.rows, other.columns) != (pair.rows, pair.columns):
            continue
        base = other.pick(other.step.start, data.rows).double()
        expected = base + expected_delta(other, base, data.rows, whole=data.whole)
        error = ((data.merged - expected) / spacing(data.merged, pair.dtype)).square().mean() * 12
        if float(error) < FITS:
            return f"it is swapped: it holds what {other.step.output.name} should"
    return ""


def _applied_twice(pair: Pair, data: Evidence) -> str:
    """Tests a method whose change depends on the weight on its own result."""
    if pair.products:
        return ""
    again = reapplied(pair, data.base + data.delta, data.rows, whole=data.whole)
    return "the adapter is applied twice" if data.fits(again - data.base) else ""
