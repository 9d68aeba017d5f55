"""Writes an adapter's folder, whole or not at all: config, tensors, and a manifest with its history last."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adapterhub_tools import registry
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.base import BaseRef, is_repository_id
from adapterhub_tools.model.manifest import MANIFEST_NAME, HistoryEntry, HistoryInput, Manifest
from adapterhub_tools.model.version import VERSION
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, read_adapter
from adapterhub_tools.ops.manifest_file import record_files
from adapterhub_tools.ops.spool import Content, StoredContent
from adapterhub_tools.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_tools.store.destination import check_space
from adapterhub_tools.store.directory import StagedDirectory, stage, write_all
from adapterhub_tools.store.layout import build_file
from adapterhub_tools.store.side_files import classify

if TYPE_CHECKING:
    from adapterhub_tools.model.tensor import TensorSpec
    from adapterhub_tools.ops.server_report import ServerReport
    from adapterhub_tools.ops.shrink_report import LowRankReport

Report = TypeVar("Report", bound="LowRankReport | ServerReport")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An adapter to be written.

    Attributes:
        adapter: what it is; its tensors have any names that differ, which the dialect replaces.
        contents: name of a tensor in the description -> its bytes.
        history: the operation that made it; the entries before it come from ``before``.
        before: the manifest of the adapter that it came from, whose training, licence, tags and history go
            on; None if there is none, or if it came from several.
        side: a folder whose tokenizer, templates and licence go along; None for none.
        base_modules: paths of the base's modules that have weights, if the base is known.
        dialect: the naming scheme to write.
    """

    adapter: Adapter
    contents: Mapping[str, Content]
    history: HistoryEntry
    before: Manifest | None = None
    side: Path | None = None
    base_modules: Collection[str] | None = None
    dialect: str = "peft"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenAdapter:
    """What was written.

    Attributes:
        path: the folder.
        nbytes: bytes of the weight file.
        digest: the adapter digest.
        config: the content of its config.
        manifest: its manifest.
        notes: what else is to be told.
    """

    path: str
    nbytes: int
    digest: str
    config: dict[str, Any]
    manifest: Manifest
    notes: tuple[str, ...]


class _Replacing(Protocol):
    """The options of an operation that say whether it may replace a folder."""

    @property
    def replace(self) -> bool: ...

    @property
    def allow_replace_gap(self) -> bool: ...


def write_and_report(
    draft: Draft, report: Report, out: Path, *, inputs: Sequence[Path], options: _Replacing
) -> Report:
    """Writes an adapter's folder, and returns the report with what was written.

    Args:
        draft: what to write.
        report: what the operation found and did; its ``notes`` are kept.
        out: the folder to make.
        inputs: what was read; the output may not overlap it.
        options: those of the operation.

    Raises:
        UnsupportedError: the dialect cannot express the adapter.
        StoreError: the folder cannot be written; what was there is untouched.
    """
    written = write_adapter(
        draft, out, inputs=inputs, replace=options.replace, allow_replace_gap=options.allow_replace_gap
    )
    return dataclasses.replace(
        report,
        out=str(out),
        nbytes=written.nbytes,
        digest=written.digest,
        config=written.config,
        notes=report.notes + written.notes,
    )


def write_adapter(
    draft: Draft,
    out: Path,
    *,
    inputs: Sequence[Path],
    replace: bool = False,
    allow_replace_gap: bool = False,
) -> WrittenAdapter:
    """Writes an adapter's folder.

    Before it becomes visible, the folder is read back by the same rules as any other adapter, so that what
    this package would refuse is never written.

    Args:
        draft: what to write.
        out: the folder to make.
        inputs: what was read; the output may not overlap it.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.

    Raises:
        UnsupportedError: the dialect cannot express the adapter.
        StoreError: the folder cannot be written; what was there is untouched.
    """
    written = registry.load("dialects", draft.dialect).write(draft.adapter, base_modules=draft.base_modules)
    config = _config_bytes(written.config)
    order: list[tuple[str, TensorSpec]] = sorted(written.tensors.items(), key=lambda item: item[1].name)
    header, offsets = build_file([spec for _, spec in order], {"format": "pt"})
    length = len(header) + sum(spec.nbytes for _, spec in order)
    check_space(out.absolute().parent, length + len(config))
    with stage(out, inputs=inputs, replace=replace, allow_replace_gap=allow_replace_gap) as staged:
        staged.write_bytes(CONFIG_FILE, config)
        by_offset = sorted(order, key=lambda item: offsets[item[1].name])
        _write_weights(staged, header, by_offset, draft.contents)
        sources = [item.source for item in draft.contents.values() if isinstance(item, StoredContent)]
        for source in {id(source): source for source in sources}.values():
            source.check_unchanged()
        for name in _side_names(draft.side):
            staged.copy_file(draft.side / name if draft.side else Path(name), name)
        manifest, digest = _manifest(read_adapter(staged.path, accept_embeddings=True), draft)
        staged.commit((MANIFEST_NAME, manifest.to_bytes()))
    return WrittenAdapter(
        path=str(out),
        nbytes=length,
        digest=digest,
        config=written.config,
        manifest=manifest,
        notes=tuple(f"could not be removed: {name}" for name in staged.left),
    )


def history_entry(
    operation: str,
    *,
    inputs: Sequence[HistoryInput],
    options: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> HistoryEntry:
    """Returns the record of an operation of this program; options that are None are left out."""
    return HistoryEntry(
        operation=operation,
        tool="adaptertool",
        tool_version=VERSION,
        inputs=tuple(inputs),
        options={name: value for name, value in options.items() if value is not None},
        figures=dict(figures),
    )


def known_base(opened: OpenedAdapter) -> BaseRef | None:
    """Returns the base that an adapter's manifest records, or else the one that its config names."""
    recorded = None if opened.manifest is None else opened.manifest.base
    return recorded if recorded is not None and recorded != BaseRef() else opened.adapter.base


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, indent=2, allow_nan=False)
    return (text + "\n").encode("utf-8")


def _write_weights(
    staged: StagedDirectory,
    header: bytes,
    tensors: Sequence[tuple[str, TensorSpec]],
    contents: Mapping[str, Content],
) -> None:
    fd = staged.create(WEIGHTS_FILE)
    try:
        write_all(fd, header)
        for name, _ in tensors:
            for chunk in contents[name].chunks():
                write_all(fd, chunk)
        os.fsync(fd)
    except OSError as error:
        raise staged.error(error, "write it", WEIGHTS_FILE) from error
    finally:
        os.close(fd)
    staged.mark_synced(WEIGHTS_FILE)


def _side_names(side: Path | None) -> tuple[str, ...]:
    """Returns which files beside an adapter's weights go along: tokenizer, templates, licence."""
    return () if side is None or not side.is_dir() else classify(side).copy


def _manifest(opened: OpenedAdapter, draft: Draft) -> tuple[Manifest, str]:
    """Returns the manifest of what was just written, and the adapter digest."""
    resolved = {module.path: module for module in draft.adapter.modules}
    modules = tuple(
        dataclasses.replace(
            module,
            kind=resolved[module.path].kind if module.kind == "linear" else module.kind,
            base_shape=resolved[module.path].base_shape,
        )
        if module.path in resolved
        else module
        for module in opened.adapter.modules
    )
    before, base = draft.before, draft.adapter.base
    kept = None if before is None else before.base.id
    if base is not None and base.id not in (None, kept) and not is_repository_id(base.id or ""):
        base = dataclasses.replace(base, id=None)  # a local path, from the config
    adapter = dataclasses.replace(opened.adapter, modules=modules, base=base)
    digest = adapter_digest(opened.files, opened.adapter)
    manifest = Manifest(
        adapter=adapter,
        files=record_files(opened.files.root),
        digest=digest,
        history=(*(before.history if before else ()), draft.history),
        training={} if before is None else before.training,
        licence=None if before is None else before.licence,
        tags=() if before is None else before.tags,
    )
    return manifest, digest
