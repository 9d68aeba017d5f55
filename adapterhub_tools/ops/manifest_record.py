"""Whether a manifest says what the files of an adapter and its base say: before a merge, and to validate."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from adapterhub_tools.errors import IntegrityError, Problem, raise_for
from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.ops.base_report import main_dtype
from adapterhub_tools.ops.manifest_file import file_problem
from adapterhub_tools.store.digest import file_sha256
from adapterhub_tools.store.files import resolve_inside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterhub_tools.model.adapter import Adapter, TargetModule
    from adapterhub_tools.model.manifest import Manifest
    from adapterhub_tools.ops.adapter_reader import OpenedAdapter
    from adapterhub_tools.ops.fit import Fit
    from adapterhub_tools.store.adapter_files import AdapterFiles
    from adapterhub_tools.store.checkpoint import Checkpoint

_REWRITE = "Run `adaptertool init --replace` if the change is yours; otherwise get the adapter again."
_REWRITE_WITH_BASE = "Write the manifest again with `adaptertool init --replace --base`, or get it again."
OTHER_TARGETS = (
    "It is the base that the manifest names, but the record is of other targets: write it again with "
    "`adaptertool init --replace --base`."
)
"""What to do where the digest of a whole base agrees, and that of its targets does not."""
_CHUNK = 4 << 20


def stale(kind: str, message: str, loc: str, remedy: str = _REWRITE) -> Problem:
    """Returns the problem that a manifest says something else than what it describes."""
    return Problem(kind=kind, message=message, file=MANIFEST_NAME, loc=loc, remedy=remedy)


def check_record(opened: OpenedAdapter) -> None:
    """Refuses an adapter whose manifest contradicts its config or weights; none is no contradiction.

    Method, hyperparameters and targets are compared with what the files say, then the sizes and SHA-256 of
    the config and the weights. Other files of the adapter are not read.

    Raises:
        IntegrityError: they differ; every problem.
        StoreError: a file cannot be read, or was changed since it was opened.
    """
    if opened.manifest is None:
        return
    problems = record_problems(opened.adapter, opened.manifest)
    problems += _file_problems(opened.files, opened.manifest)
    raise_for(problems, IntegrityError)


def record_problems(described: Adapter, manifest: Manifest) -> list[Problem]:
    """Returns where method and targets of a manifest differ from what the adapter's own files say."""
    recorded = manifest.adapter
    problems = []
    if (recorded.method, recorded.dialect) != (described.method, described.dialect):
        says, found = f"{recorded.dialect} {recorded.method}", f"{described.dialect} {described.method}"
        message = f"the manifest says {says}; the files are {found}."
        problems.append(stale("manifest-differs", message, "/method"))
    if recorded.hparams != described.hparams:
        message = "the hyperparameters differ from those of the adapter's files."
        problems.append(stale("manifest-differs", message, "/method/hyperparameters"))
    theirs = {place_of(module): module for module in recorded.modules}
    ours = {place_of(module): module for module in described.modules}
    for path in sorted(theirs.keys() | ours.keys()):
        if path not in ours:
            problems.append(stale("manifest-differs", "lists a module that the files do not have.", path))
        elif path not in theirs:
            problems.append(stale("manifest-differs", "does not list this module of the files.", path))
        elif _facts(theirs[path]) != _facts(ours[path]):
            message = "the record of this module differs from the adapter's files."
            problems.append(stale("manifest-differs", message, path))
    if set(map(str, recorded.full)) != set(map(str, described.full)):
        message = "the tensors carried in full differ from those of the adapter's files."
        problems.append(stale("manifest-differs", message, "/targets/full"))
    if recorded.ties != described.ties:
        message = "whether tied embeddings stay tied differs from what the adapter's files say."
        problems.append(stale("manifest-differs", message, "/targets/ties_embeddings"))
    return problems


def module_base_problems(fitted: Fit, manifest: Manifest) -> list[Problem]:
    """Returns where the kinds and base shapes of a manifest's modules differ from those on a base.

    A manifest that was written without a base has no shapes, and its kinds are only what the config says;
    those are not compared.
    """
    problems = []
    found = {place_of(module): module for module in fitted.described}
    for module in manifest.adapter.modules:
        place = place_of(module)
        ours = found.get(place)
        if ours is None or module.base_shape is None or ours.base_shape is None:
            continue
        if module.base_shape != ours.base_shape:
            message = f"the manifest says base_shape {list(module.base_shape)}; the base's weight has "
            message += f"{list(ours.base_shape)}."
            problems.append(stale("base-shape", message, place, _REWRITE_WITH_BASE))
        if module.kind not in ("unknown", ours.kind):
            message = f"the manifest says kind {module.kind}; on this base it is {ours.kind}."
            problems.append(stale("base-kind", message, place, _REWRITE_WITH_BASE))
    return problems


def base_fact_problems(checkpoint: Checkpoint, manifest: Manifest) -> list[Problem]:
    """Returns where architecture, dtype and number of parameters of a base differ from the record."""
    base = manifest.base
    model_type = (checkpoint.config or {}).get("model_type")
    pairs = (
        ("architecture", base.architecture, model_type if isinstance(model_type, str) else None),
        ("dtype", base.dtype, main_dtype(checkpoint)),
        ("parameters", base.parameters, sum(t.spec.elements for t in checkpoint.tensors.values())),
    )
    return [
        stale(
            f"base-{name}",
            f"the manifest says {recorded}; the base has {found}.",
            f"/base/{name}",
            _REWRITE_WITH_BASE,
        )
        for name, recorded, found in pairs
        if recorded is not None and found is not None and recorded != found
    ]


def place_of(module: TargetModule) -> str:
    """Returns what tells a module from all others: its path, and its nesting where several share one."""
    nesting = module.hparams.get("nesting", 0)
    return f"{module.path}@{nesting}" if nesting else module.path


def _facts(module: TargetModule) -> tuple[object, ...]:
    """What the adapter's own files alone decide: a base may tell more about the kind and shape."""
    return module.method, module.hparams, module.factors


def _file_problems(files: AdapterFiles, manifest: Manifest) -> Iterator[Problem]:
    """Yields where size and SHA-256 of config and weights differ from the manifest's records."""
    records = {record.path: record for record in manifest.files}
    for name in (files.config_file, files.weights_file):
        if name is None:
            continue
        record = records.get(name)
        if record is None:
            yield file_problem(
                "unlisted-file", "is read with the adapter, but the manifest does not list it.", name
            )
            continue
        size, sha256 = _weights_sha256(files) if name == files.weights_file else _config_sha256(files, name)
        if size != record.size:
            yield file_problem("file-size", f"has {size:,} bytes; the manifest says {record.size:,}.", name)
        elif sha256 != record.sha256:
            message = f"has SHA-256 {sha256}; the manifest says {record.sha256}."
            yield file_problem("file-digest", message, name)


def _weights_sha256(files: AdapterFiles) -> tuple[int, str]:
    digest = hashlib.sha256()
    with files.open_weights() as source:
        for start in range(0, source.length, _CHUNK):
            digest.update(source.read(start, min(_CHUNK, source.length - start)))
        return source.length, digest.hexdigest()


def _config_sha256(files: AdapterFiles, name: str) -> tuple[int, str]:
    real = resolve_inside(files.root, name)
    return real.stat().st_size, file_sha256(real)
