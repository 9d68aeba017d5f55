"""Undoing a step: predicts the base's values from the merged ones, keeps what is wrong, and puts it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import CHUNK_BYTES, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.formula import formula, line_inverse
from adapterhub_tools.engine.undo_coding import HEAD, RecordHead, decode, encode
from adapterhub_tools.engine.undo_predict import (
    Predictor,
    ScaledPredictor,
    as_bits,
    pack_gains,
    unpack_gains,
)
from adapterhub_tools.errors import FormatError, IntegrityError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.line_gains import GAIN_BITS
from adapterhub_tools.model.undo import COPY, MERGED, NEGATED_SUM, SCALED, ZERO
from adapterhub_tools.store.digest import TensorHasher

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.formats import AnyArray, F64Array
    from adapterhub_tools.model.plan import ByteRange, Step, Term
    from adapterhub_tools.model.protocols import OpenSource
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.store.writer import RangeWriter


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """How one base tensor is written again.

    Attributes:
        predictor: COPY, NEGATED_SUM, SCALED, MERGED or ZERO.
        base: the base tensor's name, dtype and shape.
        file: the output file.
        offset: where its bytes go.
        merged: the merged tensor; None for ZERO.
        digest: that tensor's digest, which it must still have; None for ZERO.
        records: the records' bytes; None for COPY.
        terms: what the merge added.
        gains: for SCALED, the bytes of the gains.
    """

    predictor: str
    base: TensorSpec
    file: str
    offset: int
    merged: ByteRange | None = None
    digest: bytes | None = None
    records: ByteRange | None = None
    terms: tuple[Term, ...] = ()
    gains: bytes | None = None


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
        data = np.frombuffer(source.read(item.offset + at, size), dtype=_plane_type(size))
        job.put(encode(data, None, len(data)))


def restore(
    item: Restore,
    writer: RangeWriter,
    open_source: Callable[[str], OpenSource],
    algorithm: str,
    device: str,
    advance: Callable[[int], None],
) -> bytes:
    """Writes one base tensor, and returns its digest.

    Raises:
        FormatError: the records are broken.
        IntegrityError: the merged tensor is not the one that the receipt records.
        StoreError: an input cannot be read.
        OSError: the output cannot be written.
    """
    hasher = TensorHasher(algorithm, item.base)
    if item.predictor == COPY:
        _restore_copy(item, writer, open_source, hasher, advance)
    elif item.predictor == ZERO:
        _restore_whole(item, writer, open_source, hasher, advance)
    else:
        _restore_predicted(item, writer, open_source, hasher, algorithm, device, advance)
    return hasher.digest()


def _restore_copy(
    item: Restore,
    writer: RangeWriter,
    open_source: Callable[[str], OpenSource],
    hasher: TensorHasher,
    advance: Callable[[int], None],
) -> None:
    merged = _merged(item)
    source = open_source(merged.uri)
    for at in range(0, item.base.nbytes, CHUNK_BYTES):
        data = memoryview(source.read(merged.offset + at, min(CHUNK_BYTES, item.base.nbytes - at)))
        hasher.update(data)
        writer.write(data, item.offset + at)
        advance(len(data))
    # Same dtype, shape and bytes: the same digest.
    _check_digest(item, hasher.digest())


def _restore_whole(
    item: Restore,
    writer: RangeWriter,
    open_source: Callable[[str], OpenSource],
    hasher: TensorHasher,
    advance: Callable[[int], None],
) -> None:
    import numpy as np

    reader = _Records(item, open_source)
    at = 0
    while at < item.base.nbytes:
        size = min(CHUNK_BYTES, item.base.nbytes - at)
        kind = _plane_type(size)
        head, payload = reader.next(size // np.dtype(kind).itemsize)
        if head.rows * np.dtype(kind).itemsize != size:
            raise reader.broken("a record does not have the bytes of its chunk")
        values = decode(head, payload, np.zeros(head.rows, dtype=kind))
        data = memoryview(values.view(np.uint8).data)
        hasher.update(data)
        writer.write(data, item.offset + at)
        advance(len(data))
        at += size
    reader.end()


def _restore_predicted(
    item: Restore,
    writer: RangeWriter,
    open_source: Callable[[str], OpenSource],
    hasher: TensorHasher,
    algorithm: str,
    device: str,
    advance: Callable[[int], None],
) -> None:
    import numpy as np

    merged = _merged(item)
    source = open_source(merged.uri)
    rows, columns = matrix_shape(item.base.shape)
    merged_dtype = torch_dtype(merged.spec.dtype)
    merged_row = columns * merged_dtype.itemsize
    base_row = columns * torch_dtype(item.base.dtype).itemsize
    check = TensorHasher(algorithm, merged.spec)
    predict = _predictor(item, merged, open_source, device)
    reader = _Records(item, open_source)
    limit = max(1, CHUNK_BYTES // max(1, base_row))
    first = 0
    while first < rows:
        head, payload = reader.next(min(limit, rows - first))
        raw = torch.empty(head.rows * merged_row, dtype=torch.uint8)
        if merged_row:
            source.read_into(memory_of(raw), merged.offset + first * merged_row)
        check.update(memory_of(raw))
        predicted = predict(raw.view(merged_dtype).view(head.rows, columns), first)
        data = memoryview(np.ascontiguousarray(decode(head, payload, predicted)).view(np.uint8).data)
        hasher.update(data)
        if base_row:
            writer.write(data, item.offset + first * base_row)
        advance(len(raw))
        first += head.rows
    reader.end()
    _check_digest(item, check.digest())


def _predictor(
    item: Restore, merged: ByteRange, open_source: Callable[[str], OpenSource], device: str
) -> Callable[[Tensor, int], AnyArray]:
    """Returns what predicts bits from merged rows and the number of the first one."""
    rows, columns = matrix_shape(item.base.shape)
    if item.predictor != SCALED:
        inverse: Expression = DeltaSum((), rows)
        if item.predictor == NEGATED_SUM:
            inverse = formula(_step_back(item, merged, negated(item.terms)), open_source)
        return Predictor(
            inverse, columns=columns, merged=merged.spec.dtype, base=item.base.dtype, device=device
        ).bits
    back = line_inverse(_step_back(item, merged, item.terms), open_source)
    scaled = ScaledPredictor(back, rows=rows, columns=columns, base=item.base.dtype, device=device)
    gains = unpack_gains(item.gains or b"", item.base.dtype, rows if back.by_row else columns, item.base.name)

    def predict(part: Tensor, first: int) -> AnyArray:
        return scaled.bits(part, first, gains[first : first + len(part)] if back.by_row else gains)

    return predict


def _step_back(item: Restore, merged: ByteRange, terms: tuple[Term, ...]) -> Step:
    from adapterhub_tools.model.plan import Step

    return Step(
        action="merge",
        start=merged,
        output=item.base,
        file=item.file,
        offset=item.offset,
        terms=terms,
    )


class _Records:
    """The records of one tensor, in order."""

    def __init__(self, item: Restore, open_source: Callable[[str], OpenSource]) -> None:
        if item.records is None:
            raise ValueError("a tensor that is not copied has records")
        self._item = item
        self._source = open_source(item.records.uri)
        self._at = item.records.offset
        self._end = item.records.offset + item.records.spec.nbytes

    def next(self, most_rows: int) -> tuple[RecordHead, bytes]:
        if self._at + HEAD.size > self._end:
            raise self.broken("its records end early")
        head = RecordHead.parse(self._source.read(self._at, HEAD.size))
        begin = self._at + HEAD.size
        self._at = begin + head.payload
        if self._at > self._end or not 0 < head.rows <= most_rows:
            raise self.broken("a record covers more than it may")
        return head, self._source.read(begin, head.payload)

    def end(self) -> None:
        if self._at != self._end:
            raise self.broken("it has more records than rows")

    def broken(self, what: str) -> FormatError:
        return FormatError.of(
            "undo-record",
            f"{what}.",
            file=self._source.name,
            loc=self._item.base.name,
            remedy="The file is damaged: get it again.",
        )


def _merged(item: Restore) -> ByteRange:
    if item.merged is None:
        raise ValueError("only a stored tensor has no merged one")
    return item.merged


def _check_digest(item: Restore, found: bytes) -> None:
    if item.digest is not None and found != item.digest:
        raise IntegrityError.of(
            "merged-tensor",
            f"its digest is {found.hex()}, but the receipt records {item.digest.hex()}.",
            file="" if item.merged is None else item.file,
            loc=item.base.name,
            remedy="The merged model was changed after the merge: get it again.",
        )


def _plane_type(size: int) -> str:
    """Returns the element type whose byte planes are compressed: two bytes where they come out even."""
    return "u1" if size % 2 else "u2"
