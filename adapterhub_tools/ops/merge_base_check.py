"""Compares the base of a merge, and each adapter, with what the adapters' manifests record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub_tools.errors import FormatError, IntegrityError, UnsupportedError, raise_for
from adapterhub_tools.model.receipt import ReceiptBase
from adapterhub_tools.ops.adapter_reader import OpenedAdapter
from adapterhub_tools.ops.base_config import tie_problems
from adapterhub_tools.ops.manifest_record import OTHER_TARGETS, check_record, module_base_problems
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.digest import DEFAULT, config_digest, root_digest, split_digest

if TYPE_CHECKING:
    from adapterhub_tools.ops.merge_plan import MergePlan


def recorded_algorithm(opened: Sequence[OpenedAdapter]) -> str:
    """Returns the digest algorithm that the manifests use; they must agree."""
    found = set()
    for item in opened:
        if item.manifest is not None:
            for digest in (item.manifest.base.digest, item.manifest.base.targets_digest):
                if digest is not None:
                    found.add(split_digest(digest)[0])
    if len(found) > 1:
        raise UnsupportedError.of(
            "digest-algorithms",
            f"the manifests record the base with different algorithms ({', '.join(sorted(found))}).",
            remedy="Write one of the manifests again with `adaptertool init --replace`.",
        )
    return found.pop() if found else DEFAULT


def check_records(parts: Sequence[Part], checkpoint: Checkpoint, options: MergeOptions) -> None:
    """Compares the manifests with the adapters' own files, and with what the base's headers and config say.

    With another rope it is another model, whatever its weights. What is said of the base is not compared
    with ``check_base="off"``.

    Raises:
        IntegrityError: they differ.
        FormatError: the base's config does not say clearly whether an embedding that is changed is tied.
    """
    for part in parts:
        check_record(part.opened)
        raise_for(tie_problems(checkpoint, part.fit.changed_names), FormatError)
    if options.check_base == "off":
        return
    found = None if checkpoint.config is None else config_digest(checkpoint.config)
    for part in parts:
        manifest = part.opened.manifest
        if manifest is None:
            continue
        raise_for(module_base_problems(part.fit, manifest), IntegrityError)
        recorded = manifest.base.config_digest
        if recorded is not None and found is not None and recorded != found:
            raise IntegrityError.of(
                "base-config",
                f"the base's config is {found}, but the adapter's manifest records {recorded}.",
                file=checkpoint.config_file or "",
                remedy="Use the base that the adapter was trained on, or --check-base off.",
            )


def compare_base(
    digests: dict[str, bytes],
    planned: MergePlan,
    parts: Sequence[Part],
    checkpoint: Checkpoint,
    options: MergeOptions,
    algorithm: str,
) -> ReceiptBase:
    """Compares the digests of what was read with the manifests' records.

    Raises:
        IntegrityError: they differ.
    """
    full = root_digest(algorithm, digests) if options.check_base == "full" else None
    targets = None
    if options.check_base != "off":
        targets = root_digest(algorithm, {name: digests[name] for name in planned.targets})
    recorded = False
    for part in parts:
        manifest = part.opened.manifest
        if manifest is None or options.check_base == "off":
            continue
        names = checkpoint.stored_names(part.fit.target_names)
        own = root_digest(algorithm, {name: digests[name] for name in names})
        pairs: list[tuple[str, str | None, str | None]] = [
            ("base-targets", manifest.base.targets_digest, own)
        ]
        if options.check_base == "full":
            pairs.insert(0, ("base", manifest.base.digest, full))
        for kind, expected, found in pairs:
            if expected is None:
                continue
            recorded = True
            if expected != found:
                other_base = f"Use the base it was trained on ({manifest.base.id or 'id not recorded'})."
                same_base = full is not None and full == manifest.base.digest
                raise IntegrityError.of(
                    kind,
                    f"this base is {found}, but the adapter's manifest records {expected}.",
                    file=str(checkpoint.root),
                    loc=part.label,
                    remedy=OTHER_TARGETS if same_base else other_base,
                )
    checked = options.check_base if recorded or options.check_base == "off" else "unrecorded"
    config = None if checkpoint.config is None else config_digest(checkpoint.config)
    return ReceiptBase(digest=full, targets_digest=targets, config_digest=config, checked=checked)
