"""The pieces of a merge before it is planned: an adapter on its base, and what happens to one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterhub_tools.model.plan import ByteRange, RowPatch, Term
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.fit import Fit
from adapterhub_tools.store.files import LocalFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter of a merge.

    Attributes:
        opened: the adapter.
        fit: how it lies on the base.
        scale: the caller's factor on its delta.
        label: what to call it in messages and as the start of its file's name.
        module_scales: module path -> a factor on its delta in place of ``scale``.
        key: the adapter's digest, where adapters are combined.
    """

    opened: OpenedAdapter
    fit: Fit
    scale: float
    label: str
    module_scales: Mapping[str, float] = field(default_factory=dict)
    key: str = ""

    def scale_of(self, path: str) -> float:
        """Returns the factor on a module's delta."""
        return self.module_scales.get(path, self.scale)

    def range_of(self, spec: TensorSpec) -> ByteRange:
        """Returns where a tensor of the adapter is."""
        files = self.opened.files
        if files.header is None:
            raise ValueError("an adapter without tensors has no ranges")
        return ByteRange(uri=self.uri, offset=files.header.offsets[spec.name], spec=spec)

    @property
    def uri(self) -> str:
        """The adapter's weight file."""
        return str(self.opened.files.path)

    def open(self) -> LocalFile:
        """Opens the adapter's weight file, which must be as it was when its header was read."""
        files = self.opened.files
        if files.path is None:
            raise ValueError("an adapter without tensors cannot be opened")
        return LocalFile(files.path, name=f"{self.label}/{files.weights_file}", expect=files.stamp)


@dataclass(slots=True)
class Change:
    """What happens to one output tensor.

    Attributes:
        start: where its values begin, if not in the base tensor of its name.
        terms: what is added.
        patch: which rows are replaced.
    """

    start: ByteRange | None = None
    terms: list[Term] = field(default_factory=list)
    patch: RowPatch | None = None
