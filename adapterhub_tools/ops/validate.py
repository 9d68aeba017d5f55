"""Checks an adapter: schema, config, tensors, values, files, and its base. Collects every problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.errors import (
    AdapterError,
    FormatError,
    IntegrityError,
    Problem,
    StoreError,
    UnsupportedError,
    UnsupportedVersionError,
)
from adapterhub_tools.model.manifest import MANIFEST_NAME, SCHEMA_NAME, Manifest
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import SAVED_EMBEDDING, examine_files
from adapterhub_tools.ops.base_check import CHECKS, base_problems, fit_problems
from adapterhub_tools.ops.dequantised_view import stored_view
from adapterhub_tools.ops.finite import finite_problems
from adapterhub_tools.ops.manifest_file import file_problems, manifest_path
from adapterhub_tools.ops.manifest_record import (
    base_fact_problems,
    module_base_problems,
    record_problems,
    stale,
)
from adapterhub_tools.ops.quantised_base import quantised_weights, recorded_scheme_problems
from adapterhub_tools.ops.random_tensors import random_problems
from adapterhub_tools.ops.validation_report import Collector, ValidationReport
from adapterhub_tools.store.adapter_files import AdapterFiles, open_adapter_files
from adapterhub_tools.store.checkpoint import Checkpoint, open_checkpoint
from adapterhub_tools.store.schemas import check
from adapterhub_tools.store.strict_json import read_json
from adapterhub_tools.store.values import bool_problems

if TYPE_CHECKING:
    from adapterhub_tools.model.adapter import Adapter
    from adapterhub_tools.model.protocols import Progress


def validate(
    adapter: Path,
    *,
    base: Path | Checkpoint | None = None,
    check_base: str = "full",
    accept_embeddings: bool = False,
    cache: bool = True,
    progress: Progress | None = None,
) -> ValidationReport:
    """Checks an adapter, and how it fits a base if one is given.

    Args:
        adapter: its folder, or its ``.safetensors`` file.
        base: the base.
        check_base: which of the manifest's base digests to compare: ``"full"``, ``"targets"`` or ``"off"``.
        accept_embeddings: whether the adapter may carry embeddings that its config does not mention.
        cache: whether the digest cache may be used.
        progress: told how far the digest of the base is.

    Returns:
        a report with every problem; nothing that is wrong with the adapter or the base is raised.

    Raises:
        UnsupportedError: ``check_base`` is another word.
    """
    if check_base not in CHECKS:
        raise UnsupportedError.of(
            "check-base",
            f"{check_base!r} is not a way to check the base.",
            remedy=f"Use one of {', '.join(CHECKS)}.",
        )
    found = Collector()
    manifest = _check_manifest(adapter, found)
    files = found.run("files", lambda: open_adapter_files(adapter))
    described = None
    if files is None:
        found.skip("tensors", "the adapter's files could not be read")
    else:
        described = _check_content(files, found, accept_embeddings)
    if manifest is not None:
        _check_record(adapter, files, described, manifest, found)
    if base is None:
        found.skip("base", "no base was given")
    elif described is None:
        found.skip("base", "the adapter's tensors could not be read")
    else:
        _check_base(described, manifest, base, found, check_base, cache, progress)
    return found.report(str(adapter))


def _check_manifest(adapter: Path, found: Collector) -> Manifest | None:
    """Checks the manifest against its rules and its schema; a reader's message stands before the schema's."""
    try:
        path = manifest_path(adapter)
    except StoreError:  # opening its files says why
        found.skip("manifest", "the path cannot be examined")
        return None
    if not path.exists():
        found.skip("manifest", f"there is no {MANIFEST_NAME}")
        return None
    data = found.run("manifest", lambda: read_json(path))
    if data is None:
        return None
    try:
        manifest = Manifest.from_json(data)
    except UnsupportedVersionError as error:
        found.add(UnsupportedVersionError, error.problems)
        return None
    except FormatError as error:
        found.add(FormatError, error.problems)
        told = {problem.loc for problem in error.problems}
        rest = [problem for problem in check(data, SCHEMA_NAME, MANIFEST_NAME) if problem.loc not in told]
        found.add(FormatError, rest)
        return None
    found.add(FormatError, check(data, SCHEMA_NAME, MANIFEST_NAME))
    return manifest


def refused(path: str, error: AdapterError) -> ValidationReport:
    """Returns the report on an adapter whose content was refused before it could be opened as a folder.

    Args:
        path: the adapter, as given.
        error: why.
    """
    found = Collector()
    found.add(type(error), error.problems)
    found.skip("content", "it was refused while it was pulled")
    return found.report(path)


def _check_content(files: AdapterFiles, found: Collector, accept_embeddings: bool) -> Adapter | None:
    """Checks config, tensors and values."""
    examined = found.run("tensors", lambda: examine_files(files))

    def values() -> None:
        with files.open_weights() as source:
            if files.header is not None:
                offsets = files.header.offsets
                tensors = ((spec, offsets[name]) for name, spec in files.header.tensors.items())
                found.add(FormatError, finite_problems(source, tensors))
                found.add(FormatError, bool_problems(source, files.header))

    found.run("values", values)
    if examined is None:
        return None
    described, problems = examined
    allowed = (SAVED_EMBEDDING,) if accept_embeddings else ()
    found.add(FormatError, (problem for problem in problems if problem.kind not in allowed))
    found.add(
        UnsupportedError,
        (
            Problem(
                kind=kind,
                message=f"it cannot be merged: {message}",
                file=files.config_file or files.weights_file or "",
                remedy=remedy,
                severity="warning",
            )
            for kind, message, remedy in described.blockers
        ),
    )
    return described


def _check_record(
    adapter: Path,
    files: AdapterFiles | None,
    described: Adapter | None,
    manifest: Manifest,
    found: Collector,
) -> None:
    """Compares the manifest with what lies beside it."""
    root = adapter if adapter.is_dir() else adapter.parent
    found.run("file list", lambda: found.add(IntegrityError, file_problems(root, manifest.files)))
    if described is None or files is None:
        found.skip("record", "the adapter's tensors could not be read")
        return
    found.add(IntegrityError, record_problems(described, manifest))
    recorded = manifest.digest
    if recorded is None or files.weights_file is None:
        found.skip(
            "adapter digest", "none is recorded" if recorded is None else "there are no weights to read"
        )
        return
    algorithm = recorded.partition(":")[0]
    computed = found.run("adapter digest", lambda: adapter_digest(files, described, algorithm=algorithm))
    if computed is not None and computed != recorded:
        message = f"the tensors have {computed}; the manifest says {recorded}."
        found.add(IntegrityError, [stale("adapter-digest", message, "/digest")])


def _check_base(
    described: Adapter,
    manifest: Manifest | None,
    base: Path | Checkpoint,
    found: Collector,
    check_base: str,
    cache: bool,
    progress: Progress | None,
) -> None:
    checkpoint = found.run("base files", lambda: _open_base(base, manifest, found, check_base))
    if checkpoint is None:
        found.skip("base", "the base could not be read")
        return
    fitted = found.run("base fit", lambda: fit_problems(described, checkpoint, found.add))
    if manifest is None or fitted is None:
        found.skip(
            "base digest", "no manifest records one" if manifest is None else "the adapter does not fit"
        )
        return

    def digests() -> None:
        problems = base_problems(
            manifest, checkpoint, fitted, check_base=check_base, cache=cache, progress=progress
        )
        found.add(IntegrityError, problems)

    if check_base != "off":
        found.add(IntegrityError, module_base_problems(fitted, manifest))
    if check_base == "full":
        found.add(IntegrityError, base_fact_problems(checkpoint, manifest))
    known = manifest.base
    compared = known.targets_digest or (known.digest if check_base == "full" else None)
    if check_base == "off":
        found.skip("base digest", "not asked for")
    elif compared is not None:
        found.run("base digest", digests)
    else:
        found.skip("base digest", "the manifest records none")
        if known.config_digest is not None:
            found.run("base config", digests)
    if manifest.base.random_digest is not None:
        found.run("random tensors", lambda: found.add(IntegrityError, random_problems(fitted, manifest)))


def _open_base(
    base: Path | Checkpoint, manifest: Manifest | None, found: Collector, check_base: str
) -> Checkpoint:
    """Opens a base; one that is stored quantised is seen as plain weights, and its scheme is compared.

    Raises:
        FormatError: a file is broken; a quantised weight lacks a part, or is damaged.
        UnsupportedError: of a format, or of a scheme, that is not known here.
        StoreError: a file cannot be read.
    """
    checkpoint = open_checkpoint(base)
    weights = quantised_weights(checkpoint)
    if manifest is not None and check_base != "off":
        found.add(IntegrityError, recorded_scheme_problems(manifest, weights))
    return stored_view(checkpoint, weights)
