"""Tensors that an adapter carries in full although they are the base's own."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from adapterhub_tools.architectures import lookup
from adapterhub_tools.ops.name_rules import choose_rule
from adapterhub_tools.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Source
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.ops.adapter_reader import OpenedAdapter
    from adapterhub_tools.ops.server_table import Server

_VALUES = 1 << 20


def own_tensors(opened: OpenedAdapter, base: Checkpoint, server: Server) -> Iterator[str]:
    """Yields the names of tensors that a server refuses, and that hold the same numbers as the base.

    PEFT saves embeddings when a vocabulary was resized or may have been, and modules to save that training
    did not reach: to leave them out changes nothing.

    Args:
        opened: the adapter.
        base: its base.
        server: what the server accepts.

    Raises:
        StoreError: a file cannot be read.
    """
    adapter = opened.adapter
    candidates = [
        item
        for item in adapter.full
        if item.rows is None and item.role in server.features and server.features[item.role].accepts is False
    ]
    if not candidates or opened.files.header is None:
        return
    rule = choose_rule(adapter, base.tensors.keys(), lookup((base.config or {}).get("model_type")), [])
    offsets = opened.files.header.offsets
    with opened.files.open_weights() as source:
        for item in candidates:
            path, _, leaf = item.target.rpartition(".")
            stored = base.tensors.get(f"{rule.to_disk(path, base.tensors.keys())}.{leaf}")
            if stored is None or stored.spec.shape != item.tensor.shape:
                continue
            with base.open(stored.file) as other:
                pair = (source, offsets[item.tensor.name], item.tensor), (other, stored.offset, stored.spec)
                if _same_values(*pair):
                    yield item.tensor.name


def _same_values(left: tuple[Source, int, TensorSpec], right: tuple[Source, int, TensorSpec]) -> bool:
    """Compares two tensors of the same shape as numbers, whatever their dtypes."""
    import torch

    from adapterhub_tools.linalg.formats import FORMATS

    if left[2].dtype not in FORMATS or right[2].dtype not in FORMATS:
        return False
    count = prod(left[2].shape)
    for first in range(0, count, _VALUES):
        number = min(_VALUES, count - first)
        values = []
        for source, offset, spec in (left, right):
            kind = getattr(torch, FORMATS[spec.dtype].torch_name)
            size = spec.nbytes // count
            data = bytearray(source.read(offset + first * size, number * size))
            values.append(torch.frombuffer(data, dtype=kind).double())
        if not torch.equal(values[0], values[1]):
            return False
    return True
