"""A small merge as patterns of bits, its exact result, and two ways to run it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from adapterhub_tools.engine.buffers import Buffers
from adapterhub_tools.engine.tensor_job import Surroundings, run_step
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS as PACKAGE_FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.methods.lora import LoRA
from adapterhub_tools.model.plan import ByteRange, Placement, Step, Term
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.files import LocalFile
from adapterhub_tools.store.writer import RangeWriter
from tests.property.exact_oracle import FORMATS, Format, Part, merged, nearest_by_search


@dataclass(kw_only=True)
class Product:
    """One LoRA module: patterns of B (rows, k) and A (k, columns) as the delta lies in the tensor."""

    format: Format
    left: np.ndarray
    right: np.ndarray
    alpha: float
    rank: int
    rooted: bool
    multiplier: float
    row: int
    column: int
    transposed: bool

    @property
    def scaling(self) -> str:
        return "alpha/sqrt(rank)" if self.rooted else "alpha/rank"

    @property
    def scale(self) -> Part:
        top = Fraction(self.alpha) * Fraction(self.multiplier) / self.rank
        return Part(coefficient=top, root=self.rank if self.rooted else 1)

    @property
    def stored(self) -> dict[str, np.ndarray]:
        """The factors as an adapter holds them."""
        if self.transposed:
            return {"A": self.left.T, "B": self.right.T}
        return {"A": self.right, "B": self.left}


@dataclass(kw_only=True)
class Case:
    """One merge of a small matrix."""

    start_format: Format
    to: Format
    start: np.ndarray
    products: list[Product]
    kinds: Counter = field(default_factory=Counter)

    def describe(self) -> str:
        lines = [f"{self.start_format.name} -> {self.to.name}, W = {_hex(self.start)}"]
        lines += [
            f"{p.format.name} L = {_hex(p.left)} R = {_hex(p.right)} at ({p.row}, {p.column}), "
            f"alpha {p.alpha!r} rank {p.rank} {p.scaling} times {p.multiplier!r}"
            for p in self.products
        ]
        return "\n".join(lines)

    def delta(self, i: int, j: int) -> list[Part]:
        parts = []
        for p in self.products:
            row, column = i - p.row, j - p.column
            if not (0 <= row < p.left.shape[0] and 0 <= column < p.right.shape[1]):
                continue
            value = p.format.value
            total = sum(
                (value(int(a)) * value(int(b)) for a, b in zip(p.left[row], p.right[:, column], strict=True)),
                Fraction(0),
            )
            parts.append(Part(coefficient=total * p.scale.coefficient, root=p.scale.root))
        return parts

    def expected(self) -> np.ndarray:
        """The right patterns; also counts what kinds of element the case has."""
        out = np.empty(self.start.shape, dtype=self.to.unsigned)
        for (i, j), pattern in np.ndenumerate(self.start):
            delta = self.delta(i, j)
            bits, x = merged(int(pattern), self.start_format, delta, self.to)
            out[i, j] = bits
            self._count(bits, x, self.start_format.value(int(pattern)))
        return out

    def _count(self, bits: int, x: Fraction, w: Fraction) -> None:
        to, kinds = self.to, self.kinds
        kinds["elements"] += 1
        size = bits & (to.sign - 1)
        if size >= to.infinity:
            kinds["overflow"] += 1
            return
        kinds["largest"] += size == to.infinity - 1
        kinds["subnormal"] += 0 < size < 1 << to.fraction_bits
        kinds["smallest normal"] += size == 1 << to.fraction_bits
        kinds["minus zero"] += bits == to.sign
        kinds["non-zero to zero"] += size == 0 and x != 0
        kinds["x - x"] += x == 0 and w != 0
        error = abs(abs(x) - to.magnitude(size))
        ulp = to.magnitude(size + 1) - to.magnitude(size)
        kinds["tie"] += error == ulp / 2
        kinds["near tie"] += error != ulp / 2 and abs(error - ulp / 2) < ulp / 2**24
        kinds["cancellation"] += x != 0 and abs(x) < abs(w) / 2**20
        if to.width == 16 and x != 0:
            twice = nearest_by_search(FORMATS["F32"].value(nearest_by_search(x, FORMATS["F32"])), to)
            kinds["double rounding"] += twice != bits


def _hex(patterns: np.ndarray) -> str:
    return json.dumps([[hex(int(v)) for v in row] for row in patterns])


def through_rounder(case: Case) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Runs a case through LoRA.delta and BlockRounder."""
    terms = [
        LoRA(rank=p.rank, alpha=p.alpha, scaling=p.scaling, multiplier=p.multiplier).delta(
            {role: p.format.tensor(values) for role, values in p.stored.items()},
            Weight(
                kind="conv1d" if p.transposed else "linear",
                shape=case.start.shape,
                row=p.row,
                column=p.column,
            ),
        )
        for p in case.products
    ]
    rows, columns = case.start.shape
    rounder = BlockRounder(
        DeltaSum(terms, rows),
        columns=columns,
        start=PACKAGE_FORMATS[case.start_format.name],
        to=PACKAGE_FORMATS[case.to.name],
    )
    out = case.to.tensor(np.full((rows, columns), 0x5A5A))
    wrong = rounder.round_rows(case.start_format.tensor(case.start), out, 0)
    return case.to.patterns(out), None if wrong is None else (wrong.row, wrong.column)


def through_engine(case: Case, folder: Path) -> np.ndarray:
    """Runs a case through the engine's step, from files to a file."""
    data, ranges = bytearray(), {}

    def store(name: str, of: Format, patterns: np.ndarray) -> ByteRange:
        spec = TensorSpec(name=name, dtype=of.name, shape=patterns.shape)
        found = ByteRange(uri="in", offset=len(data), spec=spec)
        data.extend(np.ascontiguousarray(patterns.astype(of.unsigned)).tobytes())
        return found

    terms = []
    for index, p in enumerate(case.products):
        ranges = {role: store(f"{index}.{role}", p.format, values) for role, values in p.stored.items()}
        rows = (p.row, p.row + p.left.shape[0])
        columns = (p.column, p.column + p.right.shape[1])
        terms.append(
            Term(
                module=f"module{index}",
                method="lora",
                hparams={
                    "rank": p.rank,
                    "alpha": p.alpha,
                    "scaling": p.scaling,
                    "multiplier": p.multiplier,
                    "kind": "conv1d" if p.transposed else "linear",
                },
                factors=ranges,
                placement=Placement(base_tensor="w", rows=rows, columns=columns, transposed=p.transposed),
            )
        )
    start = store("w", case.start_format, case.start)
    output = TensorSpec(name="w", dtype=case.to.name, shape=case.start.shape)
    step = Step(
        action="merge", start=start, output=output, file="out", offset=8, terms=tuple(terms), base_name="w"
    )
    (folder / "in").write_bytes(data)
    source = LocalFile(folder / "in", name="in")
    writer = RangeWriter(folder / "out", 8 + output.nbytes, drop_pages=False)
    around = Surroundings(
        algorithm="tensor-tree-blake3-v1",
        device="cpu",
        hash_base=lambda name: True,
        open_source=lambda uri: source,
        advance=lambda count: None,
        stopped=lambda: False,
    )
    try:
        run_step(Step.from_json(json.loads(json.dumps(step.to_json()))), writer, around, Buffers())
        return np.frombuffer((folder / "out").read_bytes()[8:], dtype=case.to.unsigned).reshape(
            case.start.shape
        )
    finally:
        writer.close()
        source.close()
        (folder / "out").unlink()
