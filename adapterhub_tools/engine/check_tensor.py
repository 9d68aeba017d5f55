"""Checks one merged tensor against its base: exactly on rows, and by random probes on all of it.

A probe x has entries ±1 (Freivalds 1977). For a correct merge M = round(W + D) the residual
(M − W − D)·x is a sum of rounding errors, each at most half a unit in the last place u and about uniform, so
that its variance is at most about Σu²/12. A row left out, a permuted factor or another scale gives far more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.check_points import (
    LOWEST,
    PRECISION,
    Product,
    RowCheck,
    Wrong,
    check_rows,
    delta_rounded_first,
    round_block,
)
from adapterhub_tools.engine.check_products import can_multiply, product_of
from adapterhub_tools.model.protocols import OpenSource

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange, Step

PROBES = 8
SIGMA = 6.0
_BLOCK = 1 << 18
_SCALE_SLACK = 2.0**-8
"""A scale that was itself rounded to bfloat16 is off by this much and no more."""

ROUNDED_FACTORS = "factors rounded first"
"""The verdict where factors and delta were rounded to the base's dtype before the sum."""

Opener = Callable[[str], OpenSource]


@dataclass(slots=True, kw_only=True)
class Probe:
    """What the probes gave.

    Attributes:
        largest: the largest |z|.
        mean: the mean of z².
        numbers: how many there are: rows × probes.
        scale: the factor on the delta that fits best.
        scale_error: its standard error.
    """

    largest: float = 0.0
    mean: float = 0.0
    numbers: int = 0
    scale: float = 1.0
    scale_error: float = float("inf")

    @property
    def suspicious(self) -> bool:
        """Whether a correct merge would hardly give this."""
        return self.largest > SIGMA or self.mean > 1 + SIGMA * sqrt(2 / max(1, self.numbers))

    @property
    def other_scale(self) -> bool:
        """Whether the delta was certainly added with another factor."""
        off = abs(self.scale - 1)
        return off > _SCALE_SLACK and off > SIGMA * self.scale_error


@dataclass(slots=True, kw_only=True)
class TensorCheck:
    """What was found about a merged tensor.

    Attributes:
        verdict: ``"correctly rounded"``, ``"delta rounded first"``, ROUNDED_FACTORS, ``"within k ulp"`` or
            ``"wrong"``.
        rows: how many rows it has.
        rows_checked: how many were recomputed exactly.
        wrong: how many of their weights are not correctly rounded.
        steps: by how much at most, see RowCheck.
        first: the first few of them.
        probe: what the probes gave; None where they were not needed.
        escalated: True if the probes made it recompute every row.
    """

    verdict: str
    rows: int
    rows_checked: int
    wrong: int = 0
    steps: float = 0.0
    first: list[Wrong] = field(default_factory=list)
    probe: Probe | None = None
    escalated: bool = False


class Pair:
    """A base tensor, the merged one, and the deltas between them.

    Args:
        step: what the merge should have done.
        merged: where the merged tensor is.
        open_source: uri -> the open file.
        device: where to compute.
    """

    def __init__(self, step: Step, merged: ByteRange, open_source: Opener, device: str) -> None:
        """Loads the factors."""
        self.step: Step = step
        self.merged: ByteRange = merged
        self.device: str = device
        self.open_source: Opener = open_source
        rows, columns = matrix_shape(step.output.shape)
        self.rows: int = rows
        self.columns: int = columns
        self.dtype: str = merged.spec.dtype
        self.products: tuple[Product, ...] = ()
        if is_own(step):
            self.products = tuple(product_of(term, open_source) for term in step.terms)
        self.reach: Tensor = torch.zeros(self.rows, dtype=torch.float64)
        for product in self.products:
            self.reach += product.reach()

    def with_rounded_factors(self) -> Pair:
        """Returns the same pair with factors rounded to the base's dtype, as when PEFT loads them in it."""
        other = copy(self)
        dtype = self.step.start.spec.dtype
        other.products = tuple(
            replace(product, left=round_block(product.left, dtype), right=round_block(product.right, dtype))
            for product in self.products
        )
        return other

    def read(self, item: ByteRange, first: int, count: int) -> Tensor:
        """Returns rows as they are stored."""
        dtype = torch_dtype(item.spec.dtype)
        size = self.columns * dtype.itemsize
        # Pinned, a device takes it without a copy in between; torch keeps and reuses such memory.
        raw = torch.empty(count * size, dtype=torch.uint8, pin_memory=self.device != "cpu")
        if raw.numel():
            self.open_source(item.uri).read_into(memory_of(raw), item.offset + first * size)
        return raw.view(dtype).view(count, self.columns)

    def pick(self, item: ByteRange, rows: list[int]) -> Tensor:
        """Returns single rows as they are stored."""
        return torch.cat([self.read(item, row, 1) for row in rows])

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (rows, w, m) over the whole matrix."""
        size = max(1, _BLOCK // max(1, self.columns))
        for first in range(0, self.rows, size):
            count = min(size, self.rows - first)
            rows = slice(first, first + count)
            yield rows, self.read(self.step.start, first, count), self.read(self.merged, first, count)

    def check(self, rows: list[int]) -> RowCheck:
        """Compares single rows with the correctly rounded sum."""
        return check_rows(
            self.pick(self.step.start, rows),
            self.pick(self.merged, rows),
            self.products,
            self.reach,
            torch.tensor(rows),
            rows=rows,
            dtype=self.dtype,
            device=self.device,
        )

    def check_all(self) -> RowCheck:
        """Compares every row."""
        total = RowCheck(wrong=0, first=[], steps=0.0)
        for index, w, m in self.blocks():
            numbers = list(range(index.start, index.stop))
            found = check_rows(
                w, m, self.products, self.reach, index, rows=numbers, dtype=self.dtype, device=self.device
            )
            total.wrong += found.wrong
            total.first = (total.first + found.first)[:8]
            total.steps = max(total.steps, found.steps)
        return total

    def rounded_first(self, rows: list[int] | None) -> bool:
        """Says whether rows (all for None) are what PEFT makes: the delta rounded, then the sum."""
        if self.dtype != self.step.start.spec.dtype:
            return False
        if rows is not None:
            pieces: Iterator[tuple[slice | Tensor, Tensor, Tensor]] = iter(
                [(torch.tensor(rows), self.pick(self.step.start, rows), self.pick(self.merged, rows))]
            )
        else:
            pieces = iter(self.blocks())
        return all(
            delta_rounded_first(w, m, self.products, self.reach, index, dtype=self.dtype, device=self.device)
            for index, w, m in pieces
        )

    def probe(self, generator: torch.Generator, *, rounded_first: bool) -> Probe:
        """Multiplies base, delta and merged tensor with random vectors, and compares.

        Args:
            generator: of the vectors.
            rounded_first: True to allow for a delta that was itself rounded.
        """
        signs = torch.randint(0, 2, (self.columns, PROBES), generator=generator, dtype=torch.int8)
        x = (signs * 2 - 1).to(self.device, torch.float64)
        inner = [product.right.to(self.device) @ x for product in self.products]
        squares, count, largest = 0.0, 0, 0.0
        top, bottom = 0.0, 0.0
        unit = 2.0 ** (1 - PRECISION[self.dtype])
        # float32 errors are far below the rounding of 16-bit weights; of TF32, see check_points.py.
        narrow = (
            self.dtype in ("BF16", "F16") and self.step.start.spec.dtype != "F64" and self.device == "cpu"
        )
        kind, error = (torch.float32, 2.0**-23) if narrow else (torch.float64, 2.0**-53)
        signs_here = x.to(kind)
        for index, w, m in self.blocks():
            merged = m.to(self.device, kind)
            delta = torch.zeros(merged.shape[0], PROBES, dtype=torch.float64, device=self.device)
            for product, part in zip(self.products, inner, strict=True):
                delta += (product.left[index].to(self.device) * product.scale) @ part
            moved = ((merged - w.to(self.device, kind)) @ signs_here).double()
            power = _powers(merged, self.dtype)
            variance = power.square().sum(dim=1).double() * (unit**2 / 12)
            if rounded_first:
                # The delta's own size, from its products with the probes; ulps grow with it.
                variance += self.columns / 12 * 4 * unit**2 * (delta.square().mean(dim=1) / self.columns)
            reach = self.reach[index].to(self.device)
            size = 2 * power.sum(dim=1).double() + self.columns * reach
            noise = error * size
            variance = variance[:, None] + noise[:, None].square() + 1e-300
            z = (moved - delta) / variance.sqrt()
            z = z.nan_to_num(nan=float("inf"))
            largest = max(largest, float(z.abs().max())) if z.numel() else largest
            squares += float(z.square().sum())
            count += z.numel()
            top += float((moved * delta / variance).sum())
            bottom += float((delta.square() / variance).sum())
        found = Probe(largest=largest, mean=squares / max(1, count), numbers=count)
        if bottom > 0:
            found.scale, found.scale_error = top / bottom, bottom**-0.5
        return found


def _powers(values: Tensor, dtype: str) -> Tensor:
    """Returns the largest power of two in each magnitude, at least the dtype's smallest normal one."""
    least = 2.0 ** (LOWEST[dtype] + PRECISION[dtype] - 1)
    if values.dtype == torch.float32:
        return (values.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=least)
    return (values.view(torch.int64) & (0x7FF << 52)).view(torch.float64).clamp(min=least)


def check_sum(
    pair: Pair, *, sample: str, generator: torch.Generator, strict: bool, most_steps: float
) -> TensorCheck:
    """Checks a tensor that a merge changes by sums of products.

    Args:
        pair: the tensors.
        sample: ``"rows"`` for 1 % of the rows and probes, ``"full"`` for every row.
        generator: picks rows and probes.
        strict: True if nothing but the correctly rounded value will do.
        most_steps: how far from that a merge of another tool may be, in units in the last place.
    """
    if sample == "full":
        rows, found = None, pair.check_all()
    else:
        count = min(pair.rows, max(1, -(-pair.rows // 100)))
        rows = sorted(torch.randperm(pair.rows, generator=generator)[:count].tolist())
        found = pair.check(rows) if rows else RowCheck(wrong=0, first=[], steps=0.0)
    check = TensorCheck(
        verdict="correctly rounded", rows=pair.rows, rows_checked=pair.rows if rows is None else len(rows)
    )
    _judge(check, pair, found, rows, strict, most_steps)
    if check.verdict == ROUNDED_FACTORS:
        pair = pair.with_rounded_factors()
    if check.verdict == "wrong" or (rows is None and check.verdict == "correctly rounded"):
        return check
    check.probe = pair.probe(generator, rounded_first=check.verdict != "correctly rounded")
    if rows is not None and (check.probe.suspicious or check.probe.other_scale):
        check.escalated, check.rows_checked = True, pair.rows
        if check.verdict == ROUNDED_FACTORS:
            check.verdict = ROUNDED_FACTORS if pair.rounded_first(None) else "wrong"
        else:
            _judge(check, pair, pair.check_all(), None, strict, most_steps)
    if check.verdict not in ("wrong", "correctly rounded") and check.probe.other_scale:
        check.verdict = "wrong"
    return check


def _judge(
    check: TensorCheck, pair: Pair, found: RowCheck, rows: list[int] | None, strict: bool, most_steps: float
) -> None:
    check.wrong, check.first, check.steps = found.wrong, found.first, found.steps
    if not found.wrong:
        check.verdict = "correctly rounded"
    elif strict:
        check.verdict = "wrong"
    elif pair.rounded_first(rows):
        check.verdict = "delta rounded first"
    elif pair.with_rounded_factors().rounded_first(rows):
        check.verdict = ROUNDED_FACTORS
    elif found.steps <= most_steps:
        check.verdict = "within k ulp"
    else:
        check.verdict = "wrong"


def is_own(step: Step) -> bool:
    """Says whether this module has its own arithmetic for a step."""
    return (
        step.combination is None
        and bool(step.terms)
        and all(
            can_multiply(term)
            and term.placement.rows is None
            and term.placement.columns is None
            and term.placement.expert is None
            for term in step.terms
        )
    )
