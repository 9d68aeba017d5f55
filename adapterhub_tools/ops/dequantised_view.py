"""A quantised base as a plain one: a checkpoint whose weights are dequantised as they are read.

Two kinds of base are seen so: one that is stored quantised, and one that is stored in 16 or 32 bits and was
quantised while it was loaded for training, as most are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterhub_tools.architectures import lookup
from adapterhub_tools.model.base import StoredTensor
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.quant_scheme import QuantizedTensor, QuantScheme
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store.checkpoint import Checkpoint, View

if TYPE_CHECKING:
    from adapterhub_tools.engine.dequantized import LoadedTensor, TransposedTensor
    from adapterhub_tools.model.protocols import OpenSource

    Content = ByteRange | QuantizedTensor | TransposedTensor | LoadedTensor


def stored_view(
    checkpoint: Checkpoint, weights: Mapping[str, QuantizedTensor], dtype: str | None = None
) -> Checkpoint:
    """Returns a checkpoint that is stored quantised as one of plain weights.

    A quantised Conv1D is stored as (out, in), and shown as it is in a plain checkpoint.

    Args:
        checkpoint: on disk.
        weights: its quantised weights; none returns it as it is.
        dtype: the safetensors dtype of their values; None takes the one that each had before.
    """
    if not weights:
        return checkpoint
    from adapterhub_tools.engine.dequantized import TransposedTensor

    architecture = lookup((checkpoint.config or {}).get("model_type"))
    parts = {name for weight in weights.values() for name in weight.part_names}
    contents: dict[str, list[tuple[TensorSpec, Content]]] = {file: [] for file in checkpoint.files}
    for name, stored in checkpoint.tensors.items():
        if name in weights:
            spec = weights[name].spec
            turned = architecture is not None and architecture.is_conv1d(name.removesuffix(".weight"))
            shape = spec.shape[::-1] if turned else spec.shape
            shown = TensorSpec(name=name, dtype=dtype or spec.dtype, shape=shape)
            content = TransposedTensor(tensor=weights[name]) if turned else weights[name]
            contents[stored.file].append((shown, content))
        elif name not in parts:
            contents[stored.file].append((stored.spec, checkpoint.range_of(name)))
    return _shown(checkpoint, contents, {name: weight.part_names for name, weight in weights.items()})


def loaded_view(
    checkpoint: Checkpoint, scheme: QuantScheme, weights: Mapping[str, bool], dtype: str
) -> Checkpoint:
    """Returns a checkpoint in 16 or 32 bits as it was after a loader had quantised it.

    Args:
        checkpoint: on disk.
        scheme: how it was quantised.
        weights: the weights that were, and of each whether its transpose was (Conv1D).
        dtype: the safetensors dtype of their dequantised values.
    """
    from adapterhub_tools.engine.dequantized import LoadedTensor

    contents: dict[str, list[tuple[TensorSpec, Content]]] = {file: [] for file in checkpoint.files}
    for name, stored in checkpoint.tensors.items():
        item = checkpoint.range_of(name)
        if name in weights:
            shown = TensorSpec(name=name, dtype=dtype, shape=stored.spec.shape)
            loaded = LoadedTensor(item=item, scheme=scheme, transposed=weights[name])
            contents[stored.file].append((shown, loaded))
        else:
            contents[stored.file].append((stored.spec, item))
    return _shown(checkpoint, contents, {name: (name,) for name in weights})


def _shown(
    checkpoint: Checkpoint,
    contents: Mapping[str, list[tuple[TensorSpec, Content]]],
    made_from: dict[str, tuple[str, ...]],
) -> Checkpoint:
    """Lays the tensors of each file out one after the other."""
    tensors: dict[str, StoredTensor] = {}
    for file, items in contents.items():
        offset = 0
        for spec, _ in items:
            tensors[spec.name] = StoredTensor(spec=spec, file=file, offset=offset)
            offset += spec.nbytes
    files = {checkpoint.uri(file): file for file in checkpoint.files}

    def open_view(file: str) -> OpenSource:
        from adapterhub_tools.engine.dequantized import DequantizedFile, ShownTensor

        shown = [
            ShownTensor(spec=spec, offset=tensors[spec.name].offset, content=content)
            for spec, content in contents[file]
        ]
        return DequantizedFile(file, shown, lambda uri: checkpoint.open(files[uri]))

    view = View(stored=checkpoint, made_from=made_from, opener=open_view)
    return replace(checkpoint, tensors=tensors, view=view)
