"""A base opened for reading weights by rows, and which of them an adapter's modules are."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.architectures import lookup
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.ops.fit import Fit, fit
from adapterhub_tools.ops.hash import tensor_digests
from adapterhub_tools.ops.name_rules import choose_rule
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.digest import DEFAULT, root_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub_tools.engine.row_blocks import StoredRows
    from adapterhub_tools.model.protocols import OpenSource


class OpenBase:
    """A base whose files are opened once, when first read; safe to use from several threads.

    Args:
        base: its folder or file, or a base that is open already.

    Attributes:
        checkpoint: the base.
    """

    def __init__(self, base: Path | Checkpoint) -> None:
        """Reads the headers."""
        self.checkpoint: Checkpoint = open_checkpoint(base)
        self._files = {self.checkpoint.uri(file): file for file in self.checkpoint.files}
        self._opened: dict[str, OpenSource] = {}
        self._lock = threading.Lock()

    def fit(self, adapter: Adapter) -> Fit:
        """Fits an adapter to the base.

        Raises:
            MismatchError: it does not fit; every problem.
            UnsupportedError: the base is of a sort that cannot be computed with.
        """
        fitted = fit(adapter, self.checkpoint)
        fitted.raise_for_problems()
        return fitted

    def range_of(self, name: str) -> ByteRange:
        """Returns where a stored tensor is."""
        stored = self.checkpoint.tensors[name]
        return ByteRange(uri=self.checkpoint.uri(stored.file), offset=stored.offset, spec=stored.spec)

    def open(self, uri: str) -> OpenSource:
        """Returns the open file that a range names."""
        with self._lock:
            if uri not in self._opened:
                self._opened[uri] = self.checkpoint.open(self._files[uri])
            return self._opened[uri]

    def stored_rows(
        self, name: str, *, advance: Callable[[int], None] | None = None, rows: int | None = None
    ) -> StoredRows:
        """Returns a stored tensor as a matrix of float64 rows; see StoredRows."""
        from adapterhub_tools.engine.row_blocks import StoredRows

        item = self.range_of(name)
        return StoredRows(self.open(item.uri), item, advance=advance, rows=rows)

    def rows(self, fitted: Fit, path: str) -> StoredRows:
        """Returns the weight of an adapter's module."""
        return self.stored_rows(fitted.stored(fitted.placements[path].base_tensor))

    def targets_input(self, fitted: Fit) -> HistoryInput:
        """Returns the base as an input of an operation: the digest of the adapter's target tensors."""
        names = [name for name in fitted.target_names if name in self.checkpoint.tensors]
        digests, _ = tensor_digests(self.checkpoint, algorithm=DEFAULT, names=names)
        return HistoryInput(role="base-targets", digest=root_digest(DEFAULT, digests))

    def close(self) -> None:
        """Checks that no file was changed meanwhile, and closes them.

        Raises:
            StoreError: one was changed.
        """
        try:
            for source in self._opened.values():
                source.check_unchanged()
        finally:
            for source in self._opened.values():
                source.close()
            self._opened.clear()


def memory_paths(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the paths, as the adapter writes them, of the base's modules that have a weight."""
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    rule = choose_rule(adapter, checkpoint.tensors.keys(), architecture, [])
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    return tuple(rule.to_memory(name) for name in names)
