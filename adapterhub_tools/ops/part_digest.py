"""The identity of an adapter that is to be merged, compared with what its own manifest says."""

from __future__ import annotations

from adapterhub_tools.errors import IntegrityError
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.merge_parts import Part


def checked_digest(part: Part) -> str:
    """Returns the digest of an adapter's content, which its own manifest must agree with if it records one.

    Raises:
        IntegrityError: they differ.
    """
    files, adapter, manifest = part.opened.files, part.opened.adapter, part.opened.manifest
    digest = adapter_digest(files, adapter)
    recorded = None if manifest is None else manifest.digest
    if recorded is None:
        return digest
    algorithm = recorded.partition(":")[0]
    same = digest.startswith(f"{algorithm}:")
    found = digest if same else adapter_digest(files, adapter, algorithm=algorithm)
    if found != recorded:
        raise IntegrityError.of(
            "adapter",
            f"the adapter is {found}, but its manifest records {recorded}.",
            file=part.label,
            remedy="Its files were changed after `adaptertool init`: get them again, or write it anew.",
        )
    return digest
