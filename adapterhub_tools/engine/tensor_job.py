"""Runs one step of a plan: reads the start values, computes, writes the result, and digests both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.engine.buffers import (
    CHUNK_BYTES,
    Buffers,
    load_whole,
    matrix_shape,
    memory_of,
    torch_dtype,
)
from adapterhub_tools.engine.formula import formula
from adapterhub_tools.engine.undo_keep import StepRecorder, UndoJob, record_whole, wants_way_back
from adapterhub_tools.errors import AdapterError, FormatError, LossyError
from adapterhub_tools.linalg.delta_sum import DeltaSum
from adapterhub_tools.linalg.formats import FORMATS
from adapterhub_tools.linalg.rounding import BlockRounder, NonFinite
from adapterhub_tools.model.undo import ZERO
from adapterhub_tools.store.digest import TensorHasher

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.plan import ByteRange, RowPatch, Step
    from adapterhub_tools.model.protocols import OpenSource
    from adapterhub_tools.store.writer import RangeWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step gave.

    Attributes:
        output_digest: of the written tensor.
        base_digest: of the base tensor it started from, if that was asked for.
        resolved: how many values float64 could not decide.
    """

    output_digest: bytes
    base_digest: bytes | None
    resolved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What every step of a run shares.

    Attributes:
        algorithm: the digest algorithm.
        device: where products are evaluated, ``"cpu"`` or ``"cuda"``.
        hash_base: says whether a base tensor's digest is wanted.
        open_source: uri -> the open file.
        advance: told the bytes read.
        stopped: True once another step has failed.
    """

    algorithm: str
    device: str
    hash_base: Callable[[str], bool]
    open_source: Callable[[str], OpenSource]
    advance: Callable[[int], None]
    stopped: Callable[[], bool]


class Stopped(Exception):  # noqa: N818 - a signal between threads, never shown
    """Another step failed; this one ends early."""


def hash_range(item: ByteRange, around: Surroundings, buffers: Buffers) -> bytes:
    """Returns the digest of a tensor that nothing else reads."""
    source = around.open_source(item.uri)
    hasher = TensorHasher(around.algorithm, item.spec)
    for at, size in _pieces(item.spec.nbytes, CHUNK_BYTES, around):
        view = memory_of(buffers.take("start", size))
        source.read_into(view, item.offset + at)
        hasher.update(view)
    return hasher.digest()


def run_step(
    step: Step, writer: RangeWriter, around: Surroundings, buffers: Buffers, undo: UndoJob | None = None
) -> Outcome:
    """Runs a step and returns its digests.

    Args:
        step: what to do.
        writer: the output file.
        around: what all steps share.
        buffers: the worker's.
        undo: what to keep so that the step can be undone; None for nothing.

    Raises:
        FormatError: NaN or infinity in the base tensor or in the adapter.
        LossyError: a result overflows the output dtype.
        StoreError: the base cannot be read.
    """
    if undo is not None and undo.predictor == ZERO:
        record_whole(undo, around.open_source)
        undo = None
    if step.action == "copy":
        return _copy(step, writer, around, buffers)
    return _compute(step, writer, around, buffers, undo)


def _copy(step: Step, writer: RangeWriter, around: Surroundings, buffers: Buffers) -> Outcome:
    source = around.open_source(step.start.uri)
    hasher = TensorHasher(around.algorithm, step.output)
    for at, size in _pieces(step.start.spec.nbytes, CHUNK_BYTES, around):
        view = memory_of(buffers.take("start", size))
        source.read_into(view, step.start.offset + at)
        hasher.update(view)
        writer.write(view, step.offset + at)
    digest = hasher.digest()
    wanted = step.base_name is not None and around.hash_base(step.base_name)
    # The same bytes, dtype and shape have the same digest whatever the name.
    return Outcome(output_digest=digest, base_digest=digest if wanted else None, resolved=0)


def _compute(
    step: Step, writer: RangeWriter, around: Surroundings, buffers: Buffers, undo: UndoJob | None
) -> Outcome:
    source = around.open_source(step.start.uri)
    rows, columns = matrix_shape(step.output.shape)
    start_dtype, out_dtype = torch_dtype(step.start.spec.dtype), torch_dtype(step.output.dtype)
    start_row = columns * start_dtype.itemsize
    out_row = columns * out_dtype.itemsize
    expression = formula(step, around.open_source)
    rounder = BlockRounder(
        expression,
        columns=columns,
        start=FORMATS[step.start.spec.dtype],
        to=FORMATS[step.output.dtype],
        device=around.device,
        keep_non_finite=step.action == "cast",
        back=wants_way_back(step, undo),
    )
    patch = None if step.patch is None else _patch_rows(step, step.patch, around)
    recorder = None
    if undo is not None:
        recorder = StepRecorder(step, undo, around.open_source, around.device, expression)
    base_hasher = None
    if step.base_name is not None and around.hash_base(step.base_name):
        base_hasher = TensorHasher(around.algorithm, step.start.spec)
    out_hasher = TensorHasher(around.algorithm, step.output)
    per_chunk = max(1, CHUNK_BYTES // max(1, start_row, out_row))
    for first, count in _pieces(rows, per_chunk, around, unit=start_row):
        start_bytes = buffers.take("start", count * start_row)
        out_bytes = buffers.take("out", count * out_row)
        if start_row:
            source.read_into(memory_of(start_bytes), step.start.offset + first * start_row)
        if base_hasher is not None:
            base_hasher.update(memory_of(start_bytes))
        start = start_bytes.view(start_dtype).view(count, columns)
        out = out_bytes.view(out_dtype).view(count, columns)
        wrong = rounder.round_rows(start, out, first)
        if wrong is not None:
            raise non_finite_error(step, source.name, wrong)
        if patch is not None and step.patch is not None:
            for index, row in enumerate(step.patch.rows):
                if first <= row < first + count:
                    out[row - first] = patch[index]
        if recorder is not None:
            recorder.add(start, out, first, rounder.way_back)
        out_hasher.update(memory_of(out_bytes))
        if out_row:
            writer.write(memory_of(out_bytes), step.offset + first * out_row)
    return Outcome(
        output_digest=out_hasher.digest(),
        base_digest=None if base_hasher is None else base_hasher.digest(),
        resolved=rounder.resolved,
    )


def _patch_rows(step: Step, patch: RowPatch, around: Surroundings) -> Tensor:
    """Returns the replacing rows in the output dtype."""
    source = around.open_source(patch.source.uri)
    values = load_whole(source, patch.source)
    out = torch.empty(values.shape, dtype=torch_dtype(step.output.dtype))
    rounder = BlockRounder(
        DeltaSum((), int(values.shape[0])),
        columns=int(values.shape[1]),
        start=FORMATS[patch.source.spec.dtype],
        to=FORMATS[step.output.dtype],
    )
    wrong = rounder.round_rows(values, out, 0)
    if wrong is not None:
        raise non_finite_error(step, source.name, wrong)
    return out


def _pieces(total: int, size: int, around: Surroundings, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (begin, count) over a range, tells the progress, and ends when another step has failed."""
    for begin in range(0, total, size):
        if around.stopped():
            raise Stopped
        count = min(size, total - begin)
        around.advance(count * unit)
        yield begin, count


_WIDER = {
    "F16": "Write a wider type with --dtype float32 (or bfloat16), or use a smaller --scale.",
    "BF16": "Write a wider type with --dtype float64, or use a smaller --scale.",
    "F32": "Write a wider type with --dtype float64, or use a smaller --scale.",
    "F64": "No type is wider: use a smaller --scale.",
}
"""Output dtype -> what to do where a result is beyond its range."""


def non_finite_error(step: Step, file: str, at: NonFinite) -> AdapterError:
    """Returns the error for a result that is not finite: the base's fault, or too large for the dtype."""
    index = _index(at.row, at.column, step.output.shape)
    if at.start - at.start != 0:
        return FormatError.of(
            "non-finite",
            f"the value at index {index} is {at.start}; a tensor that is merged must be finite.",
            file=file,
            loc=step.start.spec.name,
            remedy="The file is damaged or was saved from a diverged run: get it again.",
        )
    return LossyError.of(
        "overflow",
        f"the result at index {index} of {step.output.name} overflows {step.output.dtype} "
        f"(it starts from {at.start:g}).",
        file=file,
        loc=step.output.name,
        remedy=_WIDER.get(step.output.dtype, "Use a smaller --scale, or another adapter."),
    )


def _index(row: int, column: int, shape: tuple[int, ...]) -> list[int]:
    if len(shape) < 2:
        return [row][: len(shape)]
    index = []
    for size in reversed(shape[1:]):
        index.append(column % size)
        column //= size
    return [row, *reversed(index)]
