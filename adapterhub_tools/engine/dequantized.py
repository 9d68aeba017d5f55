"""A quantised base as if it were not: a source of dequantised weights, which are made as they are read.

Whatever reads rows of a base (every method, every operation) reads rows of this in the same way.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import matrix_shape, memory_of, torch_dtype
from adapterhub_tools.engine.row_blocks import non_finite
from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.quant_scheme import QuantizedTensor, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.protocols import OpenSource
    from adapterhub_tools.model.tensor import TensorSpec

_BLOCK_ELEMENTS = 1 << 19
"""Weights that are dequantised at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTensor:
    """A weight that is stored in 16 or 32 bits, and was quantised while it was loaded for training.

    Attributes:
        item: where it is stored.
        scheme: how it was quantised.
        transposed: True where the loader quantised its transpose (Conv1D).
    """

    item: ByteRange
    scheme: QuantScheme
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedTensor:
    """A weight that is stored quantised as (out, in), and is (in, out) in a plain checkpoint (Conv1D).

    Attributes:
        tensor: as it is stored.
    """

    tensor: QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownTensor:
    """A tensor of the view.

    Attributes:
        spec: as it is seen.
        offset: where its bytes are in the view.
        content: what it is made from; a ByteRange is shown as it is stored.
    """

    spec: TensorSpec
    offset: int
    content: ByteRange | QuantizedTensor | TransposedTensor | LoadedTensor


class DequantizedFile:
    """An OpenSource of dequantised tensors; safe to use from several threads.

    Memory: for each reading thread 4 bytes a block of the weight that it is at, and a few MiB; of a Conv1D
    that is stored quantised, all of it.

    Args:
        name: what to call it in a message.
        shown: its tensors, by offset and without gaps.
        open_file: uri -> the stored file, which is closed with this.
    """

    def __init__(
        self, name: str, shown: Sequence[ShownTensor], open_file: Callable[[str], OpenSource]
    ) -> None:
        """Reads nothing yet."""
        self._name = name
        self._shown = tuple(shown)
        self._offsets = [item.offset for item in shown]
        self._sources = Sources(open_file)
        self._held = threading.local()

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._name

    @property
    def length(self) -> int:
        """The number of bytes of the view."""
        return self._shown[-1].offset + self._shown[-1].spec.nbytes if self._shown else 0

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``; see Source."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` from ``offset``; see OpenSource.

        Raises:
            FormatError: scales, or weights that are quantised here, are not finite.
            StoreError: a stored file cannot be read.
        """
        done = 0
        while done < len(view):
            item = self._shown[bisect_right(self._offsets, offset + done) - 1]
            inside = offset + done - item.offset
            count = min(len(view) - done, item.spec.nbytes - inside)
            if count <= 0:
                raise ValueError(f"{self._name} has {self.length} bytes; asked for those from {offset}")
            part = view[done : done + count]
            if isinstance(item.content, ByteRange):
                self._sources.open(item.content.uri).read_into(part, item.content.offset + inside)
            else:
                self._fill(item, part, inside)
            done += count

    def check_unchanged(self) -> None:
        """Checks every stored file that was read; see OpenSource."""
        self._sources.check_unchanged()

    def close(self) -> None:
        """Closes the stored files."""
        self._sources.close()

    def __enter__(self) -> DequantizedFile:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the stored files."""
        self.close()

    def _fill(self, item: ShownTensor, view: memoryview, inside: int) -> None:
        """Fills ``view`` with bytes of a tensor, which need not be whole rows."""
        dtype = torch_dtype(item.spec.dtype)
        _, columns = matrix_shape(item.spec.shape)
        row = columns * dtype.itemsize
        first, end = inside // row, -(-(inside + len(view)) // row)
        if (end - first) * row == len(view):
            out = torch.frombuffer(view, dtype=torch.uint8).view(dtype).view(end - first, columns)
            self._rows(item, first, out)
            return
        out = torch.empty(end - first, columns, dtype=dtype)
        self._rows(item, first, out)
        begin = inside - first * row
        view[:] = memory_of(out.view(torch.uint8).reshape(-1))[begin : begin + len(view)]

    def _rows(self, item: ShownTensor, first: int, out: Tensor) -> None:
        """Fills ``out`` with rows of a tensor from ``first``, a block at a time."""
        size = max(1, _BLOCK_ELEMENTS // max(1, out.shape[1]))
        for at in range(0, out.shape[0], size):
            part = out[at : at + size]
            if isinstance(item.content, QuantizedTensor):
                self._stored_rows(item.content, first + at, part)
            elif isinstance(item.content, TransposedTensor):
                part.copy_(self._turned(item.content.tensor, out.dtype)[first + at :][: part.shape[0]])
            elif isinstance(item.content, LoadedTensor):
                self._loaded_rows(item.content, first + at, part)

    def _stored_rows(self, tensor: QuantizedTensor, first: int, out: Tensor) -> None:
        codec = registry.load("quant", tensor.scheme.format).IMPLEMENTATION
        scales = self._once(tensor.spec.name, lambda: codec.scales(tensor, self._small_parts(tensor)))
        offset, nbytes = codec.data_range(tensor, first, out.shape[0])
        data = torch.empty(nbytes, dtype=torch.uint8)
        held = tensor.parts["data"]
        self._sources.open(held.uri).read_into(memory_of(data), held.offset + offset)
        codec.dequantize(tensor, data, scales, first, out.shape[0], out.dtype, out=out)

    def _turned(self, tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """Returns the transpose of a whole weight, which is kept while a thread reads it."""

        def whole() -> Tensor:
            rows, columns = tensor.spec.shape
            out = torch.empty(rows, columns, dtype=dtype)
            size = max(1, _BLOCK_ELEMENTS // max(1, columns))
            for first in range(0, rows, size):
                self._stored_rows(tensor, first, out[first : first + size])
            return out.t()

        turned: Tensor = self._once(f"{tensor.spec.name}, transposed", whole)
        return turned

    def _small_parts(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        parts = {}
        for role, item in tensor.small_parts.items():
            raw = torch.empty(item.spec.nbytes, dtype=torch.uint8)
            if raw.numel():
                self._sources.open(item.uri).read_into(memory_of(raw), item.offset)
            parts[role] = raw if item.spec.dtype == "U8" else raw.view(torch_dtype(item.spec.dtype))
        return parts

    def _loaded_rows(self, loaded: LoadedTensor, first: int, out: Tensor) -> None:
        spec = loaded.item.spec
        loader = self._once(spec.name, lambda: self._loader(loaded))
        unit, rows = loader.row_unit, matrix_shape(spec.shape)[0]
        begin, end = first - first % unit, first + out.shape[0]
        end = min(rows, end + -end % unit)
        stored = self._stored(loaded, begin, end - begin, known=loader.needs_pass)
        if (begin, end) == (first, first + out.shape[0]):
            loader.dequantized(stored, begin, out.dtype, out=out)
        else:
            out.copy_(loader.dequantized(stored, begin, out.dtype)[first - begin :][: out.shape[0]])

    def _loader(self, loaded: LoadedTensor) -> Any:
        spec = loaded.item.spec
        codec = registry.load("quant", loaded.scheme.format).IMPLEMENTATION
        loader = codec.loader(
            loaded.scheme, spec.shape, torch_dtype(spec.dtype), transposed=loaded.transposed
        )
        if loader.needs_pass:
            rows, columns = matrix_shape(spec.shape)
            size = max(1, _BLOCK_ELEMENTS // max(1, columns))
            size = max(loader.row_unit, size - size % loader.row_unit)
            for first in range(0, rows, size):
                loader.observe(self._stored(loaded, first, min(size, rows - first)))
        loader.close()
        return loader

    def _stored(self, loaded: LoadedTensor, first: int, count: int, *, known: bool = False) -> Tensor:
        """Returns rows as they are stored; ``known`` where they were read and found to be finite before."""
        item = loaded.item
        dtype, columns = torch_dtype(item.spec.dtype), matrix_shape(item.spec.shape)[1]
        row = columns * dtype.itemsize
        raw = torch.empty(count * row, dtype=torch.uint8)
        source = self._sources.open(item.uri)
        source.read_into(memory_of(raw), item.offset + first * row)
        rows = raw.view(dtype).view(count, columns)
        # A sum is finite if all values are, or nearly; quantising would turn a NaN into a number.
        if known:
            return rows
        if not bool(torch.isfinite(rows.sum(dtype=torch.float32))) and not bool(torch.isfinite(rows).all()):
            raise non_finite(rows, first, source.name, item.spec.name)
        return rows

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Returns what ``make`` gives for a tensor; each thread keeps that of the one it is at."""
        if getattr(self._held, "name", None) != name:
            self._held.name, self._held.value = None, None
            self._held.value = make()
            self._held.name = name
        return self._held.value
