"""Tensors on their way into an adapter file: kept as they are stored, or computed and set aside on disk.

The layout of a file is known only when all its shapes are, and with a policy such as an energy share the
shapes come out of the computation. So what is computed goes to an unnamed file beside the output, which the
system removes whatever happens, and is copied to its place at the end. Memory stays that of one module.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from adapterhub_tools.errors import StoreError
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.files import store_error

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.protocols import OpenSource

_CHUNK_BYTES = 4 << 20


class Content(Protocol):
    """The bytes of one tensor."""

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredContent:
    """A tensor that is copied as it stands in an input.

    Attributes:
        source: the open file.
        offset: where the data begins.
        nbytes: how many bytes they are.
    """

    source: OpenSource
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes in order."""
        for start in range(0, self.nbytes, _CHUNK_BYTES):
            yield self.source.read(self.offset + start, min(_CHUNK_BYTES, self.nbytes - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledContent:
    """A tensor that was computed.

    Attributes:
        spool: where it was put.
        offset: where it begins there.
        nbytes: how many bytes it has.
    """

    spool: Spool
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes in order."""
        for start in range(0, self.nbytes, _CHUNK_BYTES):
            yield self.spool.read(self.offset + start, min(_CHUNK_BYTES, self.nbytes - start))


class Spool:
    """A temporary file of tensors; several threads may put tensors in.

    Args:
        near: a path on the file system to use, such as the output; its nearest folder that exists is taken.
    """

    def __init__(self, near: Path) -> None:
        """Makes the file.

        Raises:
            StoreError: there is no folder that can be written.
        """
        folder = near.absolute()
        while not folder.is_dir():
            folder = folder.parent
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise store_error(error, "make a temporary file", folder) from error
        self._lock = threading.Lock()
        self._end = 0

    def put(self, tensor: Tensor, name: str) -> tuple[TensorSpec, SpooledContent]:
        """Sets a tensor aside, and returns it as a description and as content.

        Args:
            tensor: in its storage dtype.
            name: its name in the description.

        Raises:
            StoreError: it cannot be written.
        """
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
        with self._lock:
            begin = self._end
            self._end += data.nbytes
        written = 0
        try:
            while written < data.nbytes:
                written += os.pwrite(self._file.fileno(), data[written:], begin + written)
        except OSError as error:
            raise store_error(error, "write a temporary file", self._folder) from error
        spec = TensorSpec(name=name, dtype=_DTYPES[str(tensor.dtype)], shape=tuple(tensor.shape))
        return spec, SpooledContent(spool=self, offset=begin, nbytes=data.nbytes)

    def read(self, offset: int, length: int) -> bytes:
        """Returns bytes that were put in.

        Raises:
            StoreError: they cannot be read.
        """
        try:
            data = os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise store_error(error, "read a temporary file", self._folder) from error
        if len(data) != length:
            raise StoreError.of(
                "short-read",
                f"a temporary file ends {length - len(data)} bytes early.",
                file=str(self._folder),
                remedy="Check the disk, and run again.",
            )
        return data

    def __enter__(self) -> Spool:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the file."""
        self._file.close()


_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}
