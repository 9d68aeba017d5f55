"""An adapter opened for reading: its files, what its dialect makes of them, and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, raise_for
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.manifest import Manifest
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.registry import load, names
from adapterhub_tools.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, open_adapter_files

SAVED_EMBEDDING = "saved-embedding"
"""The kind of problem that an embedding is which the config does not mention; a flag allows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedAdapter:
    """An adapter and everything that was found while reading it.

    Attributes:
        files: what lies on disk.
        adapter: what it is.
        problems: what is wrong with config and tensors, and warnings.
        manifest: its manifest, if it has one.
    """

    files: AdapterFiles
    adapter: Adapter
    problems: tuple[Problem, ...]
    manifest: Manifest | None

    @property
    def dtypes(self) -> dict[str, int]:
        """The dtypes of its tensors -> how many values; the most frequent first."""
        return count_dtypes(self.files.header.tensors if self.files.header else {})


def examine_adapter(path: Path | AdapterFiles) -> OpenedAdapter:
    """Opens an adapter, or takes one that is open, and collects what is wrong with its content.

    Raises:
        FormatError: no adapter, or a file that cannot be parsed, the manifest included.
        UnsupportedError: no known naming scheme.
        StoreError: a file cannot be read.
    """
    files = open_adapter_files(path)
    adapter, problems = examine_files(files)
    manifest = None if files.manifest is None else Manifest.from_json(files.manifest)
    return OpenedAdapter(files=files, adapter=adapter, problems=problems, manifest=manifest)


def read_adapter(path: Path, *, accept_embeddings: bool = False) -> OpenedAdapter:
    """Opens an adapter whose content must be sound; warnings remain in ``problems``.

    Args:
        path: its folder or weight file.
        accept_embeddings: whether it may carry embeddings that its config does not mention.

    Raises:
        FormatError: anything is wrong; every problem.
        UnsupportedError: no known naming scheme.
        StoreError: a file cannot be read.
    """
    opened = examine_adapter(path)
    allowed = (SAVED_EMBEDDING,) if accept_embeddings else ()
    raise_for([problem for problem in opened.problems if problem.kind not in allowed], FormatError)
    return opened


def examine_files(files: AdapterFiles) -> tuple[Adapter, tuple[Problem, ...]]:
    """Returns what the dialect of some opened files makes of them, and what is wrong with them.

    Raises:
        UnsupportedError: no known naming scheme.
    """
    tensors = files.header.tensors if files.header else {}
    dialect = _dialect(tensors, files.config, files.weights_file or files.root.name)
    adapter, problems = dialect.examine(
        tensors,
        files.config,
        file=files.weights_file or WEIGHTS_FILE,
        config_file=files.config_file or CONFIG_FILE,
    )
    # Without weights, that they hold no tensor says nothing; open_weights() says what is wrong.
    kept = tuple(p for p in problems if files.header is not None or p.kind != "empty")
    return adapter, kept


def count_dtypes(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Returns dtype -> number of values, the most frequent first."""
    counts: dict[str, int] = {}
    for spec in tensors.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.elements
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _dialect(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, file: str) -> ModuleType:
    listed = names("dialects")
    for name in listed:
        module = load("dialects", name)
        if module.detect(tensors, config):
            return module
    raise UnsupportedError.of(
        "unknown-dialect",
        f"its tensors and config follow no known naming scheme ({', '.join(listed)}).",
        file=file,
        remedy="Convert it with the library that wrote it, for example to PEFT's format.",
    )
