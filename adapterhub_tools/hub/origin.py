"""``.adapter_origin.json``: where a pulled folder came from, pinned by digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.model.canonical import canonical_json

ORIGIN_NAME = ".adapter_origin.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a folder came from.

    Attributes:
        reference: as it was asked for.
        endpoint: the Hub's URL, or that of the registry.
        version: the commit, or the registry's ``"sha256:…"``.
        files: path -> SHA-256 of its content.
        verified_by_manifest: whether every file was compared with the SHA-256 in the adapter's manifest.
    """

    reference: str
    endpoint: str
    version: str
    files: Mapping[str, str]
    verified_by_manifest: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object."""
        return {
            "schema_version": "1.0",
            "reference": self.reference,
            "endpoint": self.endpoint,
            "version": self.version,
            "files": dict(self.files),
            "verified_by_manifest": self.verified_by_manifest,
        }

    def to_bytes(self) -> bytes:
        """Returns the file's content."""
        return canonical_json(self.to_json()).encode("utf-8")
