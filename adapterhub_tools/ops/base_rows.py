"""A base opened for reading weights by rows, and which of them an adapter's modules are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.architectures import lookup
from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.ops.dequantised_view import stored_view
from adapterhub_tools.ops.fit import Fit, fit
from adapterhub_tools.ops.hash import tensor_digests
from adapterhub_tools.ops.name_rules import choose_rule
from adapterhub_tools.ops.quantised_base import quantised_weights, stored_scheme
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
        dequantised: True to see a base that is stored quantised as its dequantised weights; otherwise it is
            refused when it is fitted.
        compute_dtype: the safetensors dtype of dequantised weights; None takes what the base's config says,
            else the dtype that each had before.

    Attributes:
        checkpoint: the base, or its view as dequantised weights.
        notes: what was decided by rule.
    """

    def __init__(
        self, base: Path | Checkpoint, *, dequantised: bool = False, compute_dtype: str | None = None
    ) -> None:
        """Reads the headers, and where ``dequantised`` how each weight is quantised.

        Raises:
            FormatError: a quantised weight lacks a part, or is damaged.
            UnsupportedError: of a format, or of a scheme, that is not known here.
        """
        on_disk = open_checkpoint(base)
        weights = quantised_weights(on_disk) if dequantised else {}
        scheme = stored_scheme(weights)
        self.notes: tuple[str, ...] = ()
        if scheme is not None:
            compute_dtype = compute_dtype or scheme.compute_dtype
            self.notes = (f"computed with the base's {scheme.words} weights, dequantised",)
        self.checkpoint: Checkpoint = stored_view(on_disk, weights, compute_dtype)
        files = {self.checkpoint.uri(file): file for file in self.checkpoint.files}
        self._opened = Sources(lambda uri: self.checkpoint.open(files[uri]))

    def fit(self, adapter: Adapter, label: str = "") -> Fit:
        """Fits an adapter to the base.

        Args:
            adapter: the adapter.
            label: what to call it in problems.

        Raises:
            MismatchError: it does not fit; every problem.
            UnsupportedError: the base is of a sort that cannot be computed with.
        """
        fitted = fit(adapter, self.checkpoint)
        fitted.raise_for_problems(label)
        return replace(fitted, notes=fitted.notes + self.notes)

    def range_of(self, name: str) -> ByteRange:
        """Returns where a tensor's bytes are."""
        return self.checkpoint.range_of(name)

    def open(self, uri: str) -> OpenSource:
        """Returns the open file that a range names."""
        return self._opened.open(uri)

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
        targets = [name for name in fitted.target_names if name in self.checkpoint.tensors]
        names = self.checkpoint.stored_names(targets)
        digests, _ = tensor_digests(self.checkpoint.on_disk, algorithm=DEFAULT, names=names)
        return HistoryInput(role="base-targets", digest=root_digest(DEFAULT, digests))

    def close(self) -> None:
        """Checks that no file was changed meanwhile, and closes them.

        Raises:
            StoreError: one was changed.
        """
        try:
            self._opened.check_unchanged()
        finally:
            self._opened.close()


def memory_paths(adapter: Adapter, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the paths, as the adapter writes them, of the base's modules that have a weight."""
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    rule = choose_rule(adapter, checkpoint.tensors.keys(), architecture, [])
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    return tuple(rule.to_memory(name) for name in names)
