"""The true effect of any mergeable adapter on its base: what it makes of each tensor, less what it was."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.engine.formula import formula
from adapterhub_tools.engine.row_blocks import Effect, StoredRows
from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, escape, raise_for
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.plan import ByteRange, Step
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.ops.adapter_reader import SAVED_EMBEDDING, OpenedAdapter
from adapterhub_tools.ops.base_rows import OpenBase
from adapterhub_tools.ops.fit import Fit
from adapterhub_tools.ops.merge_parts import Change, Part
from adapterhub_tools.ops.merge_plan import changes_of

if TYPE_CHECKING:
    from adapterhub_tools.linalg.expression import Expression
    from adapterhub_tools.model.protocols import OpenSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A base tensor that an adapter computes with.

    Attributes:
        module: the module's path.
        name: the base tensor, ``"<module on disk>.weight"`` or ``".bias"``.
        fitted: the module, with its kind on this base; None for a tensor of the whole model.
        step: how the tensor changes.
    """

    module: str
    name: str
    fitted: TargetModule | None
    step: Step

    @property
    def is_bias(self) -> bool:
        """True for a module's bias."""
        return self.step.terms[0].hparams.get("kind") == "bias"


class Effects:
    """An adapter on a base.

    Args:
        opened: the adapter.
        base: the base.
        stack: closes the files.
        progress: told the bytes of the base that are read.

    Attributes:
        base: the open base.
        fit: how the adapter lies on it.
        targets: the tensors that it computes with, ordered by module.
    """

    def __init__(
        self, opened: OpenedAdapter, base: Path, stack: ExitStack, progress: Progress | None = None
    ) -> None:
        """Fits the adapter to the base.

        Raises:
            MismatchError: it does not fit.
            UnsupportedError: it cannot be merged.
        """
        self.progress: Progress = progress or SilentProgress()
        check_mergeable(opened)
        said = None if opened.manifest is None else opened.manifest.base.quantisation
        compute_dtype = None if said is None else said.get("compute_dtype")
        self.base: OpenBase = OpenBase(base, dequantised=True, compute_dtype=compute_dtype)
        if said is not None and not self.base.notes:
            scheme = escape(str(said.get("scheme")))
            self.base.notes = (
                f"computed with the base's weights as stored, though the manifest records {scheme}",
            )
        stack.callback(self.base.close)
        label = opened.files.root.name
        self.fit: Fit = self.base.fit(opened.adapter, label)
        self._part = Part(opened=opened, fit=self.fit, scale=1.0, label=label)
        self._adapter = stack.enter_context(opened.files.open_weights())
        modules = {module.path: module for module in self.fit.modules}
        found = [
            Target(
                module=change.terms[0].module,
                name=name,
                fitted=modules.get(change.terms[0].module),
                step=self._step(name, change),
            )
            for name, change in changes_of(self._part).items()
            if change.terms
        ]
        self.targets: tuple[Target, ...] = tuple(sorted(found, key=lambda t: (t.module, t.name)))

    def of_module(self, path: str) -> Target:
        """Returns the weight of a module."""
        return next(t for t in self.targets if t.module == path and not t.is_bias)

    def difference(self, target: Target) -> Effect:
        """Returns f(W) − W of a tensor, in float64, as RowBlocks."""
        return Effect(self.weight(target), self.expression(target))

    def weight(self, target: Target) -> StoredRows:
        """Returns the tensor before the adapter, as float64 rows."""
        start = target.step.start
        return StoredRows(self._open(start.uri), start, advance=self.progress.advance)

    def expression(self, target: Target) -> Expression:
        """Returns the formula of the tensor after the adapter."""
        return formula(target.step, self._open)

    def _open(self, uri: str) -> OpenSource:
        return self._adapter if uri == self._part.uri else self.base.open(uri)

    def _step(self, name: str, change: Change) -> Step:
        start: ByteRange = change.start or self.base.range_of(self.fit.stored(name))
        return Step(
            action="merge",
            start=start,
            output=start.spec,
            file="",
            offset=0,
            terms=tuple(change.terms),
        )


def check_mergeable(opened: OpenedAdapter) -> None:
    """Refuses an adapter that could not be merged.

    Raises:
        FormatError: its files are broken.
        UnsupportedError: it is of a sort that no merge can express, or that this version cannot.
    """
    adapter, path = opened.adapter, str(opened.files.root)
    raise_for([p for p in opened.problems if p.kind != SAVED_EMBEDDING], FormatError)
    if adapter.blockers:
        raise UnsupportedError(
            *(
                Problem(kind=kind, file=path, message=message, remedy=remedy)
                for kind, message, remedy in adapter.blockers
            )
        )
    if not adapter.modules:
        raise UnsupportedError.of(
            "no-modules",
            "it has no target modules, so there is no delta to approximate.",
            file=path,
            remedy="Merge it into the base; tensors carried in full are no low-rank change.",
        )
