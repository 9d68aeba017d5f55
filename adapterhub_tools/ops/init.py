"""Writes the manifest of an adapter beside its own files, which stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import FormatError, MismatchError, Problem, UnsupportedError, raise_for
from adapterhub_tools.model.base import BaseRef, is_repository_id
from adapterhub_tools.model.json_fields import Fields
from adapterhub_tools.model.manifest import MANIFEST_NAME, Manifest, check_training
from adapterhub_tools.model.manifest_blocks import check_quantisation
from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import OpenedAdapter, read_adapter
from adapterhub_tools.ops.base_check import identify_base
from adapterhub_tools.ops.dequantised_view import stored_view
from adapterhub_tools.ops.fit import fit
from adapterhub_tools.ops.manifest_file import exists_error, manifest_path, record_files, write_manifest
from adapterhub_tools.ops.manifest_record import place_of
from adapterhub_tools.ops.quantised_base import quantised_weights, stored_scheme
from adapterhub_tools.ops.quantised_hints import signs
from adapterhub_tools.ops.random_tensors import random_digest
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.files import is_folder

if TYPE_CHECKING:
    from adapterhub_tools.model.adapter import Adapter
    from adapterhub_tools.model.protocols import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class InitReport:
    """What ``init`` wrote.

    Attributes:
        path: the manifest.
        manifest: its content.
        replaced: whether there was one before.
        notes: what was kept, and what was decided by rule.
    """

    path: str
    manifest: Manifest
    replaced: bool
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        manifest = self.manifest
        base = manifest.base.digest or "base not recorded"
        return (
            f"wrote {self.path}: {len(manifest.adapter.modules)} target modules, "
            f"{len(manifest.adapter.full)} tensors in full, {len(manifest.files)} files, "
            f"{manifest.digest or 'no adapter digest'}, {base}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "path": self.path,
            "replaced": self.replaced,
            "manifest": self.manifest.to_json(),
            "notes": list(self.notes),
            "summary": self.summary,
        }


def init(
    adapter: Path,
    *,
    base: Path | Checkpoint | None = None,
    replace: bool = False,
    base_id: str | None = None,
    revision: str | None = None,
    licence: str | None = None,
    tag: Sequence[str] = (),
    quantisation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> InitReport:
    """Writes ``adapter_manifest.json`` into an adapter's folder, all of it or nothing.

    Args:
        adapter: the folder.
        base: the base, whose digests and shapes are recorded then.
        replace: whether an existing manifest may be replaced; its training, licence, tags, metrics and
            history are kept, and what it says of its base where none is given now; digests of targets are
            kept only while the targets are the same.
        base_id: the base's repository id.
        revision: the base's commit or tag.
        licence: the adapter's licence.
        tag: tags; given ones take the place of those before.
        quantisation: how the base was quantised while training.
        training: facts about training, added to those before.
        cache: whether the digest cache may be used for the base.
        progress: told how far the digest of the base is.

    Raises:
        FormatError: the adapter, an existing manifest or an option is broken; every problem.
        UnsupportedError: a format that cannot be read, or a path that is no folder.
        MismatchError: the adapter does not fit the base.
        StoreError: there is a manifest already, or it cannot be written.
    """
    if not is_folder(adapter) and adapter.is_file():
        raise UnsupportedError.of(
            "not-a-folder",
            "a manifest describes a folder.",
            file=adapter.name,
            remedy="Put the file into a folder of its own, with its config, and give the folder.",
        )
    exists = manifest_path(adapter).exists()
    if exists and not replace:
        raise exists_error()
    manifest, notes = new_manifest(
        adapter,
        base=base,
        base_id=base_id,
        revision=revision,
        licence=licence,
        tag=tag,
        quantisation=quantisation,
        training=training,
        cache=cache,
        progress=progress,
    )
    _check_writable(manifest)
    written = write_manifest(adapter, manifest, replace=replace)
    return InitReport(path=str(written), manifest=manifest, replaced=exists, notes=notes)


def new_manifest(
    adapter: Path,
    *,
    base: Path | Checkpoint | None = None,
    base_id: str | None = None,
    revision: str | None = None,
    licence: str | None = None,
    tag: Sequence[str] = (),
    quantisation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> tuple[Manifest, tuple[str, ...]]:
    """Returns the manifest that ``init`` would write, and its notes; writes nothing. See ``init``."""
    _check_options(quantisation, training)
    opened = read_adapter(adapter, accept_embeddings=True)
    opened.files.open_weights().close()
    before = opened.manifest
    known, notes = _known_base(opened, base_id, revision, quantisation)
    described = opened.adapter
    notes += [*described.notes, *map(str, opened.problems)]
    if base is not None:
        on_disk = open_checkpoint(base)
        weights = quantised_weights(on_disk)
        checkpoint = stored_view(on_disk, weights)
        fitted = fit(described, checkpoint)
        fitted.raise_for_problems()
        known, warnings = identify_base(known, checkpoint, fitted, cache=cache, progress=progress)
        known = dataclasses.replace(known, random_digest=random_digest(fitted))
        described = dataclasses.replace(described, modules=fitted.described)
        scheme = stored_scheme(weights)
        if scheme is not None:
            known = _with_scheme(known, scheme)
            notes.append(f"the base is stored quantised ({scheme.words}), which is recorded")
        notes += [*fitted.notes, *warnings]
    elif before is not None:
        described = _keep_resolved(opened, before)
        known, forgotten = _forget_other_targets(known, described, before)
        notes += forgotten
    if known.quantisation is None and (found := signs(opened)):
        notes.append(
            f"it may have been trained on a quantised base ({'; '.join(found)}), and nothing says how: "
            "give --quantisation"
        )
    with ThreadPoolExecutor(1) as pool:  # two hashes of the same bytes, on two processors
        files = pool.submit(record_files, adapter)
        digest, reason = _digest(opened)
    notes += [reason] if reason else []
    manifest = Manifest(
        adapter=dataclasses.replace(described, base=known),
        files=files.result(),
        digest=digest,
        training=dict(training or {}),
        licence=licence,
        tags=tuple(tag),
    )
    if before is not None:
        manifest = _keep(manifest, before)
        if before.digest != digest:
            notes.append("the tensors differ from those of the manifest before; its other blocks were kept")
    return manifest, tuple(notes)


def _check_options(quantisation: Mapping[str, Any] | None, training: Mapping[str, Any] | None) -> None:
    """Checks what goes into the manifest as it was given, by the rules of reading one."""
    problems: list[Problem] = []
    if quantisation is not None:
        check_quantisation(Fields(dict(quantisation), loc="", file="--quantisation", problems=problems))
    if training is not None:
        check_training(Fields(dict(training), loc="", file="--training", problems=problems))
    raise_for(problems, FormatError)


def _check_writable(manifest: Manifest) -> None:
    """Refuses what no JSON file can hold: NaN in an option, an option or a file name that is no text."""
    try:
        manifest.to_bytes()
    except ValueError as error:
        raise FormatError.of(
            "not-json",
            f"a value cannot be written: {error}.",
            file=MANIFEST_NAME,
            remedy="Give finite numbers and UTF-8 text, and rename files whose names are not UTF-8.",
        ) from error


def _known_base(
    opened: OpenedAdapter,
    base_id: str | None,
    revision: str | None,
    quantisation: Mapping[str, Any] | None,
) -> tuple[BaseRef, list[str]]:
    """Joins what options, the manifest before and the adapter's config say; what comes first counts.

    Returns:
        the base, and notes.
    """
    config = opened.adapter.base or BaseRef()
    before = opened.manifest.base if opened.manifest is not None else BaseRef()
    if base_id is not None and base_id != (before.id or config.id):
        # Another base: nothing that was known of the one before holds for it.
        config = before = BaseRef()
    found, notes = base_id or before.id or config.id, []
    if found is not None and found == config.id != base_id and not is_repository_id(found):
        # Where the base lay on the machine of the training tells others nothing, and may be private.
        notes = ["the config names the base by a local path, which is left out: give --base-id"]
        found = None
    known = dataclasses.replace(
        before,
        id=found,
        revision=revision or before.revision or config.revision,
    )
    if quantisation is not None:
        known = dataclasses.replace(known, quantisation=dict(quantisation))
    return known, notes


def _with_scheme(known: BaseRef, scheme: QuantScheme) -> BaseRef:
    """Records how a base is stored quantised; what was said beyond that, such as a version, is kept.

    Raises:
        MismatchError: another scheme was said.
    """
    if known.quantisation is None:
        return dataclasses.replace(known, quantisation=scheme.to_json())
    said = QuantScheme.from_json(known.quantisation, file="--quantisation")
    if not said.same_values(scheme):
        raise MismatchError.of(
            "quant-scheme",
            f"the base is stored as {scheme.words}, but the quantisation is given as {said.words}.",
            loc="--quantisation",
            remedy="Leave --quantisation out, or give the base that the adapter was trained on.",
        )
    return dataclasses.replace(known, quantisation=scheme.to_json() | known.quantisation)


def _keep_resolved(opened: OpenedAdapter, before: Manifest) -> Adapter:
    """Returns the adapter with kinds and base shapes that the manifest before resolved by its base."""
    resolved = {module.path: module for module in before.adapter.modules}
    modules = tuple(
        dataclasses.replace(module, kind=found.kind, base_shape=found.base_shape)
        if (found := resolved.get(module.path)) is not None and found.factors == module.factors
        else module
        for module in opened.adapter.modules
    )
    return dataclasses.replace(opened.adapter, modules=modules)


def _forget_other_targets(known: BaseRef, described: Adapter, before: Manifest) -> tuple[BaseRef, list[str]]:
    """Drops the digests that the manifest before records of its own targets, where those have changed.

    What it says of the base as a whole still holds.
    """
    now, then = described, before.adapter
    forgotten = []
    if known.targets_digest is not None and _targets(now) != _targets(then):
        known = dataclasses.replace(known, targets_digest=None)
        forgotten.append("the targets are others than before, so targets_digest was left out: give --base")
    if known.random_digest is not None and _seeded(now) != _seeded(then):
        known = dataclasses.replace(known, random_digest=None)
        forgotten.append("the modules are others than before, so random_digest was left out: give --base")
    return known, forgotten


def _targets(adapter: Adapter) -> tuple[object, ...]:
    """What decides which tensors of a base are an adapter's targets."""
    modules = {(place_of(module), module.method, frozenset(module.factors)) for module in adapter.modules}
    full = {(item.target, item.role, item.rows is None) for item in adapter.full}
    return modules, full, adapter.ties


def _seeded(adapter: Adapter) -> tuple[object, ...]:
    """What decides the random tensors that an adapter does not store, on one base."""
    return adapter.hparams, {
        place_of(module): (module.method, module.hparams, module.factors) for module in adapter.modules
    }


def _digest(opened: OpenedAdapter) -> tuple[str | None, str]:
    """Returns the adapter digest, or None and why there is none."""
    try:
        return adapter_digest(opened.files, opened.adapter), ""
    except UnsupportedError as error:
        return None, f"no adapter digest: {error.problems[0].message}"


def _keep(manifest: Manifest, before: Manifest) -> Manifest:
    """Keeps what the manifest before says and no file can tell, newer fields included."""
    return dataclasses.replace(
        manifest,
        schema_version=before.schema_version,
        training={**before.training, **manifest.training},
        history=before.history,
        licence=manifest.licence or before.licence,
        tags=manifest.tags or before.tags,
        metrics=before.metrics,
        extra=before.extra,
        base_extra=before.base_extra,
    )
