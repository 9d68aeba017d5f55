"""Undoing a step: predicts the base's values from the merged ones, and corrects what was kept as wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import CHUNK_BYTES, matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.formula import formula, line_inverse
from adapterhub_tools.engine.undo_coding import HEAD, RecordHead, decode
from adapterhub_tools.engine.undo_keep import negated
from adapterhub_tools.engine.undo_predict import Predictor, ScaledPredictor, plane_type, unpack_gains
from adapterhub_tools.errors import FormatError, IntegrityError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.model.undo import COPY, NEGATED_SUM, SCALED, ZERO
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
        kind = plane_type(size)
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
    held = torch.empty(min(limit, rows) * merged_row, dtype=torch.uint8)
    first = 0
    while first < rows:
        head, payload = reader.next(min(limit, rows - first))
        raw = held[: head.rows * merged_row]
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
