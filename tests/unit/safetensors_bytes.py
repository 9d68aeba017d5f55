"""Safetensors files made by hand, for tests of the readers: bytes, entries and whole files."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.layout import build_file

NAME = "bad.safetensors"


class Memory:
    """A Source in memory that counts what is read."""

    name = NAME

    def __init__(self, data: bytes) -> None:
        self.data, self.length, self.reads = data, len(data), 0

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.length
        self.reads += length
        return self.data[offset : offset + length]


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def write_file(path: Path, **shapes: tuple[int, ...]) -> int:
    """Writes a file of float32 zeros; returns the bytes of its tensors."""
    specs = [TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in shapes.items()]
    head, _ = build_file(specs, {"format": "pt"})
    nbytes = sum(spec.nbytes for spec in specs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(nbytes))
    return nbytes
