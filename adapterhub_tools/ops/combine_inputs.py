"""The adapters of a combination: opened, identified, and compared with each other and with the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import IntegrityError, MismatchError, escape, raise_for
from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, examine_adapter
from adapterhub_tools.ops.adapter_writer import known_base
from adapterhub_tools.ops.base_check import base_problems
from adapterhub_tools.ops.effects import Effects, check_mergeable
from adapterhub_tools.ops.low_rank import Loader, checked_input, open_low_rank
from adapterhub_tools.ops.manifest_record import check_record

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Progress

_COMPARED = ("digest", "config_digest")
_OF_TARGETS = ("targets_digest", "random_digest")
"""What is recorded of a base for one adapter's own targets."""
_OF_ALL = ("quantisation",)
"""What holds for the combination only where every input says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineInput:
    """One adapter of a combination.

    Attributes:
        place: its place on the command line, from 0.
        label: what to call it: the name of its folder, or its path where several have that name.
        path: its path.
        opened: the adapter.
        loader: reads its tensors.
        digest: it as an input of the operation.
        effects: it on the base; None where no base was given.
        plain: whether its deltas are products of two factors; else they take the base.
    """

    place: int
    label: str
    path: Path
    opened: OpenedAdapter
    loader: Loader
    digest: HistoryInput
    effects: Effects | None
    plain: bool


def open_inputs(
    paths: Sequence[Path], base: Path | None, stack: ExitStack, progress: Progress | None = None
) -> tuple[CombineInput, ...]:
    """Opens the adapters, in the order of their digests, so that their order does not decide the result.

    Args:
        paths: their folders or weight files.
        base: the base, if it is given.
        stack: closes the files.
        progress: told the bytes of the base that are read.

    Raises:
        FormatError: one is broken.
        UnsupportedError: one is of a sort that cannot be combined.
        MismatchError: fewer than two, one of them twice, different bases, or a base that is needed.
        IntegrityError: one differs from its own manifest, or its manifest from the base that was given.
    """
    if len(paths) < 2:
        raise MismatchError.of(
            "adapters",
            f"{len(paths)} adapters were given; a combination needs two or more.",
            remedy="Give at least two. To scale one, use `merge --scale`; to shrink one, svd-shrink.",
        )
    labels = _labels(paths)
    _refuse_twice([str(path.resolve()) for path in paths], labels)
    found = []
    for place, (path, label) in enumerate(zip(paths, labels, strict=True)):
        opened, plain = _open(path, label, base)
        effects = None if base is None else Effects(opened, base, stack, progress)
        digest = checked_input(opened)
        source = stack.enter_context(opened.files.open_weights())
        found.append(
            CombineInput(
                place=place,
                label=label,
                path=path,
                opened=opened,
                loader=Loader(opened, source),
                digest=digest,
                effects=effects,
                plain=plain,
            )
        )
    _refuse_twice([item.digest.digest for item in found], labels)
    _compare_bases(found)
    for item in found:
        _check_base(item)
    return tuple(sorted(found, key=lambda item: item.digest.digest))


def common_base(inputs: Sequence[CombineInput]) -> BaseRef | None:
    """Returns what all inputs agree on about their base; None if nothing."""
    known = [known_base(item.opened) or BaseRef() for item in inputs]
    merged = {}
    for name in BaseRef.__slots__:
        values = [value for base in known if (value := getattr(base, name)) is not None]
        if name in _OF_ALL and len(values) < len(known):
            continue
        if name not in _OF_TARGETS and values and all(value == values[0] for value in values):
            merged[name] = values[0]
    return BaseRef(**merged) if merged else None


def _open(path: Path, label: str, base: Path | None) -> tuple[OpenedAdapter, bool]:
    opened = examine_adapter(path)
    if opened.adapter.method in ("lora", "dora"):
        opened = open_low_rank(path)
        if opened.adapter.method == "lora":
            return opened, True
    opened.files.open_weights().close()  # pickles have their own error
    check_mergeable(opened)
    check_record(opened)
    if base is None:
        raise MismatchError.of(
            "base",
            f"what {opened.adapter.method} does depends on the base, which was not given.",
            file=label,
            loc="--base",
            remedy="Give --base with the base that the adapters were trained on.",
        )
    return opened, False


def _labels(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _refuse_twice(keys: Sequence[str], labels: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for key, label in zip(keys, labels, strict=True):
        if key in seen:
            raise MismatchError.of(
                "duplicate",
                f"it is the same adapter as {escape(seen[key])}.",
                file=label,
                remedy="Give it once, with the sum of both weights.",
            )
        seen[key] = label


def _compare_bases(inputs: Sequence[CombineInput]) -> None:
    """Refuses adapters whose manifests record different bases.

    Raises:
        MismatchError: they differ.
    """
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for item in inputs:
        manifest = item.opened.manifest
        if manifest is None:
            continue
        targets = tuple(
            sorted(
                [m.path for m in item.opened.adapter.modules] + [f.target for f in item.opened.adapter.full]
            )
        )
        recorded = {name: getattr(manifest.base, name) for name in _COMPARED}
        recorded[f"targets {targets}"] = manifest.base.targets_digest
        for name, digest in recorded.items():
            if digest is None:
                continue
            key = (name, digest.partition(":")[0])
            label, other = first.setdefault(key, (item.label, digest))
            if other != digest:
                what = "config" if name == "config_digest" else "base"
                raise MismatchError.of(
                    "bases",
                    f"its manifest records the {what} {digest}, but that of {escape(label)} records {other}.",
                    file=item.label,
                    remedy="Adapters of different bases have nothing in common: deltas of one do not fit the "
                    "other.",
                )


def _check_base(item: CombineInput) -> None:
    manifest, effects = item.opened.manifest, item.effects
    if manifest is None or effects is None:
        return
    problems = base_problems(
        manifest, effects.base.checkpoint, effects.fit, check_base="full", cache=True, progress=None
    )
    raise_for(problems, IntegrityError)
