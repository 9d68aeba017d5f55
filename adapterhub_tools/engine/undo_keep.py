"""Keeps of a step what its prediction of the base gets wrong, while the merge runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import CHUNK_BYTES, matrix_shape
from adapterhub_tools.engine.formula import formula, line_inverse
from adapterhub_tools.engine.undo_coding import encode
from adapterhub_tools.engine.undo_predict import Predictor, ScaledPredictor, as_bits, pack_gains, plane_type
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.line_gains import GAIN_BITS
from adapterhub_tools.model.undo import MERGED, NEGATED_SUM, SCALED

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.formats import F64Array
    from adapterhub_tools.model.plan import ByteRange, Step, Term
    from adapterhub_tools.model.protocols import OpenSource


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoJob:
    """What of a step is kept.

    Attributes:
        predictor: NEGATED_SUM, SCALED, MERGED or ZERO, see model/undo.py.
        base: the base tensor; but for ZERO, what the step starts from.
        put: told each record, in order.
        put_gains: for SCALED, told the gains, in order.
    """

    predictor: str
    base: ByteRange
    put: Callable[[bytes], None]
    put_gains: Callable[[bytes], None] | None = None


def predictor_of(step: Step) -> str:
    """Returns what predicts the base tensor that a step changes.

    Deltas that are known exactly are taken off again; a gain for each row or column is kept and multiplied
    with. Other inverses are evaluated in float64, whose last bits depend on the machine, so that the merged
    value itself is the prediction there.
    """
    if step.combination is not None:
        return MERGED
    methods = [registry.load("methods", term.method).IMPLEMENTATION for term in step.terms]
    if methods and all(method.additive and method.guarantee == "exact" for method in methods):
        return NEGATED_SUM
    if len(step.terms) == 1 and step.patch is None and hasattr(methods[0], "has_line_inverse"):
        (term,) = step.terms
        factors = {role: item.spec for role, item in term.factors.items()}
        method, start = methods[0].from_hparams(term.hparams), step.start.spec
        floats = {start.dtype, step.output.dtype} <= set(GAIN_BITS)
        if floats and method.has_line_inverse(factors, term.hparams["kind"], start):
            return SCALED
    return MERGED


def negated(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Returns the terms with the opposite sign; exact, because the multiplier enters the exact scale."""
    return tuple(
        replace(term, hparams={**term.hparams, "multiplier": -term.hparams.get("multiplier", 1.0)})
        for term in terms
    )


class StepRecorder:
    """Keeps what a step's prediction gets wrong, chunk by chunk.

    Args:
        step: the step.
        job: what is kept of it.
        open_source: uri -> the open file.
        device: where products are evaluated.
        expression: the formula of the merge, whose gains are kept.
    """

    def __init__(
        self,
        step: Step,
        job: UndoJob,
        open_source: Callable[[str], OpenSource],
        device: str,
        expression: Any = None,
    ) -> None:
        """Loads the factors a second time; they are small."""
        self._job, self._expression = job, expression
        self._bits = FORMATS[job.base.spec.dtype].numpy_bits
        terms = negated(step.terms) if job.predictor == NEGATED_SUM else ()
        rows, columns = matrix_shape(step.output.shape)
        self._columns = columns
        base = job.base.spec.dtype
        self._scaled: ScaledPredictor | None = None
        self._gains: F64Array | None = None
        if job.predictor == SCALED:
            back = line_inverse(step, open_source)
            self._scaled = ScaledPredictor(back, rows=rows, columns=columns, base=base, device=device)
            return
        inverse = formula(replace(step, terms=terms), open_source) if terms else DeltaSum((), rows)
        self._predictor = Predictor(
            inverse, columns=columns, merged=step.output.dtype, base=base, device=device
        )

    def add(self, start: Tensor, out: Tensor, first: int) -> None:
        """Records some rows.

        Args:
            start: the base's values.
            out: the merged ones.
            first: the row that their first row is.
        """
        count = int(start.shape[0])
        if self._scaled is None:
            predicted = self._predictor.bits(out, first)
        elif self._scaled.by_row:
            predicted = self._scaled.bits(out, first, self._keep_gains(first, count))
        else:
            if self._gains is None:
                self._gains = self._keep_gains(0, self._columns)
            predicted = self._scaled.bits(out, first, self._gains)
        self._job.put(encode(as_bits(start, self._bits), predicted, count))

    def _keep_gains(self, first: int, count: int) -> F64Array:
        base = self._job.base.spec.dtype
        gains, data = pack_gains(self._expression.gains_back(first, count, GAIN_BITS[base]), base)
        if self._job.put_gains is not None:
            self._job.put_gains(data)
        return gains


def record_whole(job: UndoJob, open_source: Callable[[str], OpenSource]) -> None:
    """Keeps a base tensor as it is, whatever its dtype.

    Raises:
        StoreError: it cannot be read.
    """
    import numpy as np

    source, item = open_source(job.base.uri), job.base
    for at in range(0, item.spec.nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, item.spec.nbytes - at)
        data = np.frombuffer(source.read(item.offset + at, size), dtype=plane_type(size))
        job.put(encode(data, None, len(data)))
