"""The base of a pulled adapter: checked where it is, or pulled from the Hub, whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapterhub_tools.errors import FormatError, HubError, UnsupportedError, escape
from adapterhub_tools.hub.chain import Link
from adapterhub_tools.hub.origin import ORIGIN_NAME, Origin
from adapterhub_tools.hub.pull import PullReport
from adapterhub_tools.hub.received import StagedFile
from adapterhub_tools.hub.reference import HubReference
from adapterhub_tools.hub.selection import INDEX_SUFFIX, select_base, weights_of_base
from adapterhub_tools.hub.snapshot import HubSnapshot, Snapshot, fetch_small
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.ops.validate import validate
from adapterhub_tools.store.destination import check_destination, check_space
from adapterhub_tools.store.directory import stage
from adapterhub_tools.store.files import path_reason
from adapterhub_tools.store.folder import PICKLE_REMEDY, names_in
from adapterhub_tools.store.strict_json import parse_json


def provide_base(
    report: PullReport, adapter: Path, base: Path, *, dry_run: bool, progress: Progress | None
) -> PullReport:
    """Checks the base at a folder, or pulls it there if there is nothing; returns the report with that.

    Args:
        report: what was pulled.
        adapter: the pulled adapter.
        base: the folder.
        dry_run: whether only to look.
        progress: told how far it is.

    Raises:
        HubError: the base is not known, or cannot be had.
        IntegrityError: it is not the base that the manifest records.
        MismatchError: the adapter does not fit it.
        StoreError: the folder cannot be written.
    """
    there = base.is_dir() and bool(names_in(base))
    if there:
        if dry_run:
            return replace(report, base=f"would be checked: {base}")
        return replace(report, base=f"{_checked(adapter, base, progress)}: {base}")
    link = _end_of(report.chain)
    snapshot = HubSnapshot(HubReference(id=link.id, revision=link.commit))
    if dry_run:
        total = sum(file.size for file in _chosen(snapshot))
        return replace(report, base=f"{total:,} bytes of {link.id}@{snapshot.version} would be pulled")
    pull_base(snapshot, base, progress=progress)
    checked = _checked(adapter, base, progress)
    return replace(report, base=f"pulled and {checked}: {link.id}@{snapshot.version}, {base}")


def _checked(adapter: Path, base: Path, progress: Progress | None) -> str:
    """Checks a base against an adapter and its manifest; says how far that went."""
    found = validate(adapter, base=base, progress=progress)
    found.raise_for_problems()
    return "checked" if "base digest" in found.checked else "checked by names and shapes only"


def pull_base(snapshot: Snapshot, out: Path, *, progress: Progress | None = None) -> None:
    """Brings a base model into a folder: weights as safetensors, configs, tokenizer, licence.

    Raises:
        FormatError: it holds no model, or its index is broken.
        UnsupportedError: its weights are pickles.
        IntegrityError: bytes differ from the digests of the commit.
        HubError: it cannot be had.
        StoreError: the folder cannot be written.
    """
    check_destination(out, inputs=[])
    files = _chosen(snapshot)
    total = sum(file.size for file in files)
    check_space(out.absolute().parent, total)
    progress = progress or SilentProgress()
    digests: dict[str, str] = {}
    with stage(out, inputs=[]) as staged:
        progress.start("pulling the base", total)
        for file in files:
            with StagedFile(staged, file.path) as sink:
                digests[file.path] = snapshot.fetch(file, sink, advance=progress.advance)
        origin = Origin(
            reference=snapshot.reference,
            endpoint=snapshot.endpoint,
            version=snapshot.version,
            files=digests,
            verified_by_manifest=False,
        )
        staged.commit((ORIGIN_NAME, origin.to_bytes()))
        progress.finish()


def weight_files(snapshot: Snapshot) -> tuple[str, ...]:
    """Returns the weight files of a model, and their index if there is one, which it reads.

    Raises:
        FormatError: there are none, or the index is broken.
        UnsupportedError: the weights are pickles.
    """
    names = {file.path: file for file in snapshot.files}
    found = weights_of_base([name for name in names if "/" not in name])
    if found is None:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))]
        if pickles:
            raise UnsupportedError.of(
                "not-safetensors",
                "the weights are a Python pickle.",
                file=escape(pickles[0]),
                remedy=PICKLE_REMEDY,
            )
        raise FormatError.of(
            "no-weights",
            f"{escape(snapshot.reference)} holds no safetensors weights.",
            remedy="Check the reference.",
        )
    if not found[0].endswith(INDEX_SUFFIX):
        return found
    index = parse_json(fetch_small(snapshot, names[found[0]]), file=found[0])
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    shards = sorted(set(map(str, mapping.values()))) if isinstance(mapping, dict) else []
    wrong = [name for name in shards if path_reason(name) or name not in names]
    if wrong or not shards:
        raise FormatError.of(
            "missing-file",
            f"the index lists {escape(wrong[0]) if wrong else 'nothing'}, which is not there.",
            file=found[0],
            remedy="Ask its publisher to complete the repository.",
        )
    return (*shards, found[0])


def _chosen(snapshot: Snapshot) -> tuple[RemoteFile, ...]:
    names = {file.path: file for file in snapshot.files}
    return tuple(names[name] for name in select_base(names, weight_files(snapshot)).taken)


def _end_of(chain: tuple[Link, ...]) -> Link:
    if not chain:
        raise HubError.of(
            "no-base",
            "neither the manifest nor the config names the base.",
            loc="--base",
            remedy="Give the folder of the base, so that it is checked.",
        )
    last = chain[-1]
    if last.kind != "base":
        raise HubError.of(
            "no-base",
            f"the base {escape(last.id)} cannot be pulled ({last.note or 'it is an adapter'}).",
            loc="--base",
            remedy="Give the folder of the base, so that it is checked; the adapter itself was pulled.",
        )
    return last
