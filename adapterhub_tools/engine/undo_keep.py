"""Keeps of a step what its prediction of the base gets wrong, while the merge runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import CHUNK_BYTES, matrix_shape
from adapterhub_tools.engine.formula import formula, line_inverse
from adapterhub_tools.engine.undo_coding import encode, encode_wrong
from adapterhub_tools.engine.undo_predict import Predictor, ScaledPredictor, as_bits, pack_gains, plane_type
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.line_gains import GAIN_BITS
from adapterhub_tools.linalg.point_rounder import PointRounder
from adapterhub_tools.model.undo import MERGED, NEGATED_SUM, SCALED

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.formats import AnyArray, F64Array
    from adapterhub_tools.linalg.single_back import WayBack
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


def wants_way_back(step: Step, job: UndoJob | None) -> bool:
    """Says whether the merge may find what its undoing gets wrong: of the base itself, each value a sum."""
    return job is not None and job.predictor == NEGATED_SUM and step.patch is None and job.base == step.start


class StepRecorder:
    """Keeps what a step's prediction gets wrong, chunk by chunk.

    Args:
        step: the step.
        job: what is kept of it.
        open_source: uri -> the open file.
        device: where products are evaluated.
        expression: the formula of the merge.
    """

    def __init__(
        self,
        step: Step,
        job: UndoJob,
        open_source: Callable[[str], OpenSource],
        device: str,
        expression: Any,
    ) -> None:
        """Makes what the predictor of the job needs."""
        self._step, self._open_source, self._device = step, open_source, device
        self._job, self._expression = job, expression
        self._bits = FORMATS[job.base.spec.dtype].numpy_bits
        rows, columns = matrix_shape(step.output.shape)
        self._columns = columns
        base = job.base.spec.dtype
        self._predictor: Predictor | None = None
        self._points: PointRounder | None = None
        self._scaled: ScaledPredictor | None = None
        self._gains: F64Array | None = None
        if job.predictor == SCALED:
            back = line_inverse(step, open_source)
            self._scaled = ScaledPredictor(back, rows=rows, columns=columns, base=base, device=device)

    def add(self, start: Tensor, out: Tensor, first: int, way_back: WayBack | None) -> None:
        """Records some rows.

        Args:
            start: the base's values.
            out: the merged ones.
            first: the row that their first row is.
            way_back: from the merged values to the base's, where the merge found it.
        """
        count = int(start.shape[0])
        if way_back is not None:
            self._job.put(self._record_of(way_back, start, out, first))
            return
        if self._scaled is None:
            predicted = self._predict(out, first)
        elif self._scaled.by_row:
            predicted = self._scaled.bits(out, first, self._keep_gains(first, count))
        else:
            if self._gains is None:
                self._gains = self._keep_gains(0, self._columns)
            predicted = self._scaled.bits(out, first, self._gains)
        self._job.put(encode(as_bits(start, self._bits), predicted, count))

    def _predict(self, out: Tensor, first: int) -> AnyArray:
        """Returns the predicted bits of whole rows; the factors are loaded a second time, they are small."""
        step, base = self._step, self._job.base.spec.dtype
        if self._predictor is None:
            inverse: Expression = DeltaSum((), matrix_shape(step.output.shape)[0])
            if self._job.predictor == NEGATED_SUM:
                inverse = formula(replace(step, terms=negated(step.terms)), self._open_source)
            self._predictor = Predictor(
                inverse, columns=self._columns, merged=step.output.dtype, base=base, device=self._device
            )
        return self._predictor.bits(out, first)

    def _record_of(self, way: WayBack, start: Tensor, out: Tensor, first: int) -> bytes:
        """Returns the record of rows whose way back the merge found, but for some places."""
        import numpy as np

        if len(way.undecided):
            places = way.places.take(way.undecided)
            rows, columns = np.divmod(places, self._columns)
            merged = out.reshape(-1).index_select(0, torch.from_numpy(places)).double().numpy()
            if self._points is None:
                self._points = PointRounder(self._expression.negated(), FORMATS[self._job.base.spec.dtype])
            way.bits[way.undecided] = self._points.round(rows + first, columns, merged)
        wrong = np.flatnonzero(way.bits != way.start)
        places, bits, true = (values.take(wrong) for values in (way.places, way.bits, way.start))
        return encode_wrong(as_bits(start, self._bits), places, true, bits, int(start.shape[0]))

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
