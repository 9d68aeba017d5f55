"""Runs a step whose result is quantised: rounded rows go through an encoder, and lie in several tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import memory_of, torch_dtype
from adapterhub_tools.engine.step_rows import StepRows
from adapterhub_tools.engine.tensor_job import Stopped, Surroundings
from adapterhub_tools.store.digest import TensorHasher

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.packed import PackedOutput, PlacedTensor
    from adapterhub_tools.model.plan import Step
    from adapterhub_tools.store.writer import RangeWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedOutcome:
    """What a quantised step gave.

    Attributes:
        outputs: written tensor -> digest.
        resolved: how many values float64 could not decide.
    """

    outputs: dict[str, bytes]
    resolved: int


def run_packed(
    step: Step, packed: PackedOutput, writers: Mapping[str, RangeWriter], around: Surroundings
) -> PackedOutcome:
    """Merges a weight, rounds it once to the output's dtype, quantises that, and writes every part.

    Memory: a block of rows, and 4 bytes for each scale.

    Args:
        step: what to do.
        packed: its ``packed``.
        writers: the output files by name.
        around: what all steps share.

    Raises:
        FormatError: NaN or infinity in the base tensor or in the adapter.
        LossyError: a result overflows the output's dtype.
        StoreError: the base cannot be read.
    """
    rows = StepRows(step, around.open_source, around.device)
    codec = registry.load("quant", packed.scheme.format).IMPLEMENTATION
    encoder = codec.encoder(packed.scheme, step.output.shape, torch_dtype(step.output.dtype))
    data = _PartWriter(packed.parts["data"], writers, around)
    for first in range(0, rows.rows, rows.rows_at_once):
        if around.stopped():
            raise Stopped
        start = rows.start(first, min(rows.rows_at_once, rows.rows - first))
        around.advance(start.nbytes)
        data.add(encoder.add(rows.rounded(start, first)))
    rest, others = encoder.finish()
    data.add(rest)
    outputs = {packed.parts["data"].spec.name: data.digest()}
    for role, part in packed.parts.items():
        if role != "data":
            writer = _PartWriter(part, writers, around)
            writer.add(others[role])
            outputs[part.spec.name] = writer.digest()
    return PackedOutcome(outputs=outputs, resolved=rows.resolved)


class _PartWriter:
    """Writes one tensor from front to back, and digests it."""

    def __init__(self, part: PlacedTensor, writers: Mapping[str, RangeWriter], around: Surroundings) -> None:
        self._part = part
        self._writer = writers[part.file]
        self._hasher = TensorHasher(around.algorithm, part.spec)
        self._done = 0

    def add(self, values: Tensor) -> None:
        """Writes the next values."""
        raw = values.contiguous().reshape(-1).view(torch.uint8)
        if raw.numel():
            self._hasher.update(memory_of(raw))
            self._writer.write(memory_of(raw), self._part.offset + self._done)
            self._done += raw.numel()

    def digest(self) -> bytes:
        """Returns the digest of the tensor, which must be complete."""
        if self._done != self._part.spec.nbytes:
            raise ValueError(f"{self._part.spec.name} has {self._part.spec.nbytes} bytes, not {self._done}")
        return self._hasher.digest()
