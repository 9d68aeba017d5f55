"""Undoing a step: predicts the base's values from the merged ones, keeps what is wrong, and puts it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import CHUNK_BYTES, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.formula import formula
from adapterhub_tools.engine.undo_coding import HEAD, RecordHead, decode, encode
from adapterhub_tools.errors import FormatError, IntegrityError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder
from adapterhub_tools.model.undo import COPY, MERGED, NEGATED_SUM, ZERO
from adapterhub_tools.store.digest import TensorHasher

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.linalg.formats import AnyArray
    from adapterhub_tools.model.plan import ByteRange, Step, Term
    from adapterhub_tools.model.protocols import OpenSource
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.store.writer import RangeWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoJob:
    """What of a step is kept.

    Attributes:
        predictor: NEGATED_SUM, MERGED or ZERO, see model/undo.py.
        base: the base tensor; for the first two, what the step starts from.
        put: told each record, in order.
    """

    predictor: str
    base: ByteRange
    put: Callable[[bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """How one base tensor is written again.

    Attributes:
        predictor: COPY, NEGATED_SUM, MERGED or ZERO.
        base: the base tensor's name, dtype and shape.
        file: the output file.
        offset: where its bytes go.
        merged: the merged tensor; None for ZERO.
        digest: that tensor's digest, which it must still have; None for ZERO.
        records: the records' bytes; None for COPY.
        terms: what the merge added.
    """

    predictor: str
    base: TensorSpec
    file: str
    offset: int
    merged: ByteRange | None = None
    digest: bytes | None = None
    records: ByteRange | None = None
    terms: tuple[Term, ...] = ()


def predictor_of(step: Step) -> str:
    """Returns what predicts the base tensor that a step changes.

    Deltas that are known exactly are taken off again. Other inverses are evaluated in float64, whose last
    bits depend on the machine, so that the merged value itself is the prediction there.
    """
    methods = [registry.load("methods", term.method).IMPLEMENTATION for term in step.terms]
    exact = methods and all(method.additive and method.guarantee == "exact" for method in methods)
    return NEGATED_SUM if exact and step.combination is None else MERGED


def negated(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Returns the terms with the opposite sign; exact, because the multiplier enters the exact scale."""
    return tuple(
        replace(term, hparams={**term.hparams, "multiplier": -term.hparams.get("multiplier", 1.0)})
        for term in terms
    )


class Predictor:
    """Predicts the bits of a base tensor from rows of the merged one.

    Args:
        expression: what takes a merged value back.
        columns: the number of columns.
        merged: the dtype of the merged tensor.
        base: that of the base tensor.
        device: where products are evaluated.
    """

    def __init__(
        self, expression: Expression, *, columns: int, merged: str, base: str, device: str = "cpu"
    ) -> None:
        """Makes the rounder, with its buffers."""
        self._rounder = BlockRounder(
            expression,
            columns=columns,
            start=FORMATS[merged],
            to=FORMATS[base],
            device=device,
            keep_non_finite=True,
        )
        self._dtype = torch_dtype(base)
        self._out = torch.empty(0, dtype=self._dtype)
        self._bits = FORMATS[base].numpy_bits
        self._same = expression.identity and merged == base
        self._may_be_infinite = expression.identity

    def bits(self, rows: Tensor, first: int) -> AnyArray:
        """Returns the predicted bits, flat, valid until the next call.

        A merged value that is not finite predicts 0, and so does a whole chunk in which a prediction
        overflows: whether one does is decided exactly, so it is the same everywhere.

        Args:
            rows: merged values, shape (n, columns).
            first: the row of the matrix that their first row is.
        """
        if self._same:
            return _as_bits(rows.clone(), self._bits)
        if self._may_be_infinite and not bool(torch.isfinite(rows).all()):
            rows = torch.where(torch.isfinite(rows), rows, torch.zeros((), dtype=rows.dtype))
        if self._out.numel() < rows.numel():
            self._out = torch.empty(rows.numel(), dtype=self._dtype)
        out = self._out[: rows.numel()].view(rows.shape)
        if self._rounder.round_rows(rows, out, first) is not None:
            out.zero_()
        return _as_bits(out, self._bits)


class StepRecorder:
    """Keeps what a step's prediction gets wrong, chunk by chunk.

    Args:
        step: the step.
        job: what is kept of it.
        open_source: uri -> the open file.
        device: where products are evaluated.
    """

    def __init__(
        self, step: Step, job: UndoJob, open_source: Callable[[str], OpenSource], device: str
    ) -> None:
        """Loads the factors a second time; they are small."""
        self._put = job.put
        self._bits = FORMATS[job.base.spec.dtype].numpy_bits
        terms = negated(step.terms) if job.predictor == NEGATED_SUM else ()
        rows, columns = matrix_shape(step.output.shape)
        inverse = formula(replace(step, terms=terms), open_source) if terms else DeltaSum((), rows)
        self._predictor = Predictor(
            inverse, columns=columns, merged=step.output.dtype, base=job.base.spec.dtype, device=device
        )

    def add(self, start: Tensor, out: Tensor, first: int) -> None:
        """Records some rows.

        Args:
            start: the base's values.
            out: the merged ones.
            first: the row that their first row is.
        """
        true = _as_bits(start, self._bits)
        self._put(encode(true, self._predictor.bits(out, first), int(start.shape[0])))


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
    inverse: Expression = DeltaSum((), rows)
    if item.predictor == NEGATED_SUM:
        inverse = formula(_step_back(item, merged), open_source)
    predictor = Predictor(
        inverse, columns=columns, merged=merged.spec.dtype, base=item.base.dtype, device=device
    )
    reader = _Records(item, open_source)
    limit = max(1, CHUNK_BYTES // max(1, base_row))
    first = 0
    while first < rows:
        head, payload = reader.next(min(limit, rows - first))
        raw = torch.empty(head.rows * merged_row, dtype=torch.uint8)
        if merged_row:
            source.read_into(memory_of(raw), merged.offset + first * merged_row)
        check.update(memory_of(raw))
        predicted = predictor.bits(raw.view(merged_dtype).view(head.rows, columns), first)
        data = memoryview(np.ascontiguousarray(decode(head, payload, predicted)).view(np.uint8).data)
        hasher.update(data)
        if base_row:
            writer.write(data, item.offset + first * base_row)
        advance(len(raw))
        first += head.rows
    reader.end()
    _check_digest(item, check.digest())


def _step_back(item: Restore, merged: ByteRange) -> Step:
    from adapterhub_tools.model.plan import Step

    return Step(
        action="merge",
        start=merged,
        output=item.base,
        file=item.file,
        offset=item.offset,
        terms=negated(item.terms),
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


def _as_bits(values: Tensor, numpy_bits: str) -> AnyArray:
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits: AnyArray = values.view(signed).numpy().view(numpy_bits).reshape(-1)
    return bits


def _plane_type(size: int) -> str:
    """Returns the element type whose byte planes are compressed: two bytes where they come out even."""
    return "u1" if size % 2 else "u2"
