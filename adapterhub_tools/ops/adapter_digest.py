"""The adapter digest: one identity for one adapter, whatever dialect its files are in.

It is the tree of store/digest.py over these tensors (docs/manifest.md, "Adapter digest"):

    module/<path>/<role>             each factor, in the method's own orientation
    module/<path>/scaling            the effective scale, a scalar F64, correctly rounded
    module/<path>/method             the method's name, U8
    module/<path>/hyperparameters    others that enter the maths, as compact JSON, U8; if any
    full/<target>                    each tensor carried in full
    full/<target>/rows               for token rows, the indices, I64

Where modules are nested on one path, ``<path>`` is ``<path>@<nesting>`` for all but the outermost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.model.canonical import compact_json
from adapterhub_tools.model.scaling import scale_of
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from adapterhub_tools.model.adapter import Adapter, TargetModule
    from adapterhub_tools.model.protocols import OpenSource
    from adapterhub_tools.store.adapter_files import AdapterFiles

ALGORITHMS = {
    "adapter-tree-blake3-v1": "tensor-tree-blake3-v1",
    "adapter-tree-sha256-v1": "tensor-tree-sha256-v1",
}
"""Adapter digest -> the tensor tree that it is built like."""
DEFAULT = "adapter-tree-blake3-v1"

_CHUNK = 4 << 20
_IN_SCALE = ("rank", "alpha", "scaling", "groups")
"""Hyperparameters of a scaled low-rank module that its scale and its shapes hold already."""
_NEVER = ("fan_in_fan_out", "nesting")
"""Hyperparameters that only say how the base stores a weight, or that the place in the tree holds."""
_OWN_ROLES = ("scaling", "method", "hyperparameters")


def adapter_digest(files: AdapterFiles, adapter: Adapter, *, algorithm: str = DEFAULT) -> str:
    """Returns the digest of an adapter, ``"adapter-tree-blake3-v1:<hex>"``.

    Args:
        files: its files; only the weights are read.
        adapter: what its dialect makes of them.
        algorithm: a key of ALGORITHMS.

    Raises:
        UnsupportedError: there are no weights that can be read, or tensors whose meaning is not known.
        FormatError: two tensors would have one place in the tree.
        StoreError: the weights cannot be read.
    """
    from adapterhub_tools.store.digest import TensorHasher, root_digest

    tree = ALGORITHMS[algorithm]
    digests: dict[str, bytes] = {}

    def add(name: str, spec: TensorSpec, chunks: Iterator[bytes]) -> None:
        if name in digests:
            raise FormatError.of("duplicate", "two tensors have one place in the adapter digest.", loc=name)
        hasher = TensorHasher(tree, spec)
        for chunk in chunks:
            hasher.update(chunk)
        digests[name] = hasher.digest()

    unknown = _tensors_without_meaning(files, adapter)
    if unknown:
        raise UnsupportedError.of(
            "no-adapter-digest",
            f"{len(unknown)} tensors have no meaning known to this version, so they have no place in the "
            "adapter digest.",
            file=files.weights_file or "",
            loc=unknown[0],
            remedy="The file list of a manifest still identifies the files.",
        )
    with files.open_weights() as source:
        for spec, name in _stored(adapter):
            add(name, spec, _read(source, files, spec))
    for name, dtype, shape, data in _derived(adapter):
        add(name, TensorSpec(name=name, dtype=dtype, shape=shape), iter((data,)))
    root: str = root_digest(tree, digests)
    return f"{algorithm}:{root.rpartition(':')[2]}"


def _tensors_without_meaning(files: AdapterFiles, adapter: Adapter) -> list[str]:
    known = {spec.name for spec, _ in _stored(adapter)} | set(adapter.unparsed.get("tensors", ()))
    return [name for name in (files.header.tensors if files.header else ()) if name not in known]


def _place(module: TargetModule) -> str:
    nesting = module.hparams.get("nesting", 0)
    return f"module/{module.path}@{nesting}" if nesting else f"module/{module.path}"


def _stored(adapter: Adapter) -> Iterator[tuple[TensorSpec, str]]:
    """Yields the tensors in the weights, and their places in the tree."""
    for module in adapter.modules:
        for role, spec in module.factors.items():
            if role in _OWN_ROLES:
                raise FormatError.of("role", f"{role!r} cannot be a factor's role.", loc=module.path)
            yield spec, f"{_place(module)}/{role}"
    for full in adapter.full:
        # Rows may be trained on top of a tensor that is carried whole (a resized embedding).
        yield full.tensor, f"full/{full.target}" + ("" if full.rows is None else "/values")


def _derived(adapter: Adapter) -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Yields name, dtype, shape and data of the values that no tensor holds."""
    for module in adapter.modules:
        place = _place(module)
        scale = scale_of(module.hparams)
        if scale is not None:
            yield f"{place}/scaling", "F64", (), struct.pack("<d", scale)
        method = module.method.encode()
        yield f"{place}/method", "U8", (len(method),), method
        left_out = _NEVER if scale is None else _NEVER + _IN_SCALE
        others = {key: value for key, value in module.hparams.items() if key not in left_out}
        if others:
            text = compact_json(others)
            yield f"{place}/hyperparameters", "U8", (len(text),), text
    for full in adapter.full:
        if full.rows is not None:
            rows = struct.pack(f"<{len(full.rows)}q", *full.rows)
            yield f"full/{full.target}/rows", "I64", (len(full.rows),), rows


def _read(source: OpenSource, files: AdapterFiles, spec: TensorSpec) -> Iterator[bytes]:
    header = files.header
    offset = 0 if header is None else header.offsets[spec.name]
    for start in range(0, spec.nbytes, _CHUNK):
        yield source.read(offset + start, min(_CHUNK, spec.nbytes - start))
