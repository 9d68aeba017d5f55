"""The adapters of a merge: opened, found to be of a sort that can be merged, and fitted to the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterhub_tools import registry
from adapterhub_tools.errors import FormatError, Problem, UnsupportedError, raise_for
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, examine_adapter
from adapterhub_tools.ops.fit import fit
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.store.checkpoint import Checkpoint


def open_mergeable(path: Path, options: MergeOptions) -> OpenedAdapter:
    """Opens an adapter that is to be merged.

    Raises:
        FormatError: its files are broken; every problem.
        UnsupportedError: it is of a sort that cannot be merged; the message says why and what to do.
    """
    opened = examine_adapter(path)
    if opened.files.pickles and opened.files.header is None:
        raise UnsupportedError.of(
            "pickle",
            "its weights are a pickle, which can run code when it is read.",
            file=opened.files.pickles[0],
            remedy="Load it with PEFT in a place you trust and save it again; that writes safetensors.",
        )
    if opened.adapter.blockers:
        raise UnsupportedError(
            *(
                Problem(kind=kind, file=str(path), message=message, remedy=remedy)
                for kind, message, remedy in opened.adapter.blockers
            )
        )
    problems = opened.problems
    if options.accept_embeddings:
        problems = tuple(problem for problem in problems if problem.kind != "saved-embedding")
    raise_for(problems, FormatError)
    methods = {module.method for module in opened.adapter.modules} - set(registry.names("methods"))
    if methods:
        raise UnsupportedError.of(
            "method",
            f"adapters of type {', '.join(sorted(methods))} cannot be merged by this version.",
            file=str(path),
            remedy="Merge it with PEFT's merge_and_unload, or use a later version of adaptertool.",
        )
    if not opened.adapter.modules and not opened.adapter.full:
        raise UnsupportedError.of(
            "empty",
            "the adapter changes no weight.",
            file=str(path),
            remedy="Save it again; the file holds no tensors that belong to a module.",
        )
    return opened


def fit_all(
    opened: Sequence[OpenedAdapter], paths: Sequence[Path], scales: Sequence[float], checkpoint: Checkpoint
) -> list[Part]:
    """Fits adapters to a base.

    Args:
        opened: the adapters.
        paths: where they were found; the last part is their label.
        scales: the caller's factor for each.
        checkpoint: the base.

    Raises:
        MismatchError: one does not fit; every problem of it.
        UnsupportedError: the base is of a sort that cannot be computed with.
    """
    parts = []
    for item, path, scale in zip(opened, paths, scales, strict=True):
        fitted = fit(item.adapter, checkpoint)
        fitted.raise_for_problems(path.name or str(path))
        parts.append(Part(opened=item, fit=fitted, scale=scale, label=path.name or str(path)))
    return parts
