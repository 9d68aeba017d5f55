"""The manifest ``adapter_manifest.json``: what an adapter is, in one record beside its own files.

A required core (schema version, method, targets, base, files) and optional blocks (digest, training, history,
licence, tags, metrics). docs/manifest.md specifies it; the schema is ``adapter-manifest-1.0``. Files of every
released version are read for ever.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from adapterhub_tools.errors import FormatError, Problem, UnsupportedVersionError, escape
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.base import BaseRef
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.model.json_fields import Fields
from adapterhub_tools.model.manifest_blocks import (
    ADAPTER_DIGEST,
    ANY_DIGEST,
    method_to_json,
    read_adapter,
    read_base,
    targets_to_json,
)

MANIFEST_NAME = "adapter_manifest.json"
SCHEMA_VERSION = "1.0"
SCHEMA_NAME = "adapter-manifest-1.0"

_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")


def is_listed(path: str) -> bool:
    """Tells whether a manifest lists the file, given its path relative to the adapter's folder.

    Not listed are the manifest and what is named after it (detached signatures), ``README.md`` because
    cards are edited later, and everything in or below a name that begins with a dot (``.gitattributes``).
    """
    if path == "README.md" or path == MANIFEST_NAME or path.startswith(MANIFEST_NAME + "."):
        return False
    return not any(part.startswith(".") for part in path.split("/"))


def path_problem(path: str) -> str | None:
    """Says what is wrong with a path of the file list; None if nothing is."""
    if not path or path.startswith("/") or _DRIVE.match(path) or "\\" in path:
        return "is not a relative path with forward slashes"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "has an empty, '.' or '..' part"
    if any(ord(char) < 32 or ord(char) == 127 for char in path):
        return "has control characters"
    if not is_listed(path):
        return "names a file that a manifest never lists"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the adapter.

    Attributes:
        path: relative to the adapter's folder, with forward slashes.
        size: bytes.
        sha256: 64 lower-case hexadecimal digits.
        extra: fields of a newer minor version.
    """

    path: str
    size: int
    sha256: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the record as it stands in a manifest."""
        return {**self.extra, "path": self.path, "size": self.size, "sha256": self.sha256}

    @classmethod
    def read(cls, fields: Fields) -> FileRecord:
        """Reads what ``to_json`` wrote, adding problems to ``fields``."""
        path = fields.text("path", required=True) or ""
        wrong = path_problem(path)
        if path and wrong is not None:
            fields.complain("path", f"{escape(path)!r} {wrong}.", at="path")
        return cls(
            path=path,
            size=fields.integer("size", required=True) or 0,
            sha256=fields.text("sha256", required=True, pattern=_SHA256) or "",
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryInput:
    """Something that an operation read, identified by content.

    Attributes:
        role: what it was to the operation, such as ``"adapter"`` or ``"base"``.
        digest: its digest, with the algorithm's name.
        id: a name for people, such as a repository id.
        extra: fields of a newer minor version.
    """

    role: str
    digest: str
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the input as it stands in a manifest."""
        named = {} if self.id is None else {"id": self.id}
        return {**self.extra, **named, "role": self.role, "digest": self.digest}

    @classmethod
    def read(cls, fields: Fields) -> HistoryInput:
        """Reads what ``to_json`` wrote, adding problems to ``fields``."""
        return cls(
            role=fields.text("role", required=True) or "",
            digest=fields.text("digest", required=True, pattern=ANY_DIGEST) or "",
            id=fields.text("id"),
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One operation that led to this adapter; the oldest stands first.

    Attributes:
        operation: its name, such as ``"svd-shrink"``.
        inputs: what it read.
        options: the options that it ran with.
        tool: the program.
        tool_version: the program's version.
        figures: what it measured, such as the share of the norm that was kept.
        extra: fields of a newer minor version.
    """

    operation: str
    tool: str
    tool_version: str
    inputs: tuple[HistoryInput, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the entry as it stands in a manifest."""
        return {
            **self.extra,
            "operation": self.operation,
            "tool": self.tool,
            "tool_version": self.tool_version,
            "inputs": [item.to_json() for item in self.inputs],
            "options": self.options,
            "figures": self.figures,
        }

    @classmethod
    def read(cls, fields: Fields) -> HistoryEntry:
        """Reads what ``to_json`` wrote, adding problems to ``fields``."""
        return cls(
            operation=fields.text("operation", required=True) or "",
            tool=fields.text("tool", required=True) or "",
            tool_version=fields.text("tool_version", required=True) or "",
            inputs=tuple(HistoryInput.read(item) for item in fields.objects("inputs", required=True)),
            options=fields.mapping("options") or {},
            figures=fields.mapping("figures") or {},
            extra=fields.rest(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The record of one adapter.

    Attributes:
        adapter: method, target modules, tensors carried in full and the base.
        files: the adapter's files, ordered by path.
        schema_version: ``"1.0"``, or the newer minor version that it was read from.
        digest: the adapter digest, ``"adapter-tree-blake3-v1:<hex>"``; None where it cannot be computed.
        training: facts about training: ``optimizer``, ``lora_plus_ratio``, ``galore``, ``dataset``, and any
            other field.
        history: the operations that led here, oldest first.
        licence: an SPDX identifier, or the name that the publisher uses.
        tags: free words, in the publisher's order.
        metrics: name -> number.
        extra: top-level fields of a newer minor version.
        base_extra: likewise those of the base block.
    """

    adapter: Adapter
    files: tuple[FileRecord, ...]
    schema_version: str = SCHEMA_VERSION
    digest: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    history: tuple[HistoryEntry, ...] = ()
    licence: str | None = None
    tags: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    base_extra: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> BaseRef:
        """The base that the adapter belongs to; one without fields where nothing is known."""
        return self.adapter.base or BaseRef()

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as a JSON object; optional blocks that are empty are left out."""
        data: dict[str, Any] = {
            **self.extra,
            "schema_version": self.schema_version,
            "method": method_to_json(self.adapter),
            "targets": targets_to_json(self.adapter),
            "base": {**self.base_extra, **self.base.to_json()},
            "files": [item.to_json() for item in self.files],
        }
        optional = {
            "digest": self.digest,
            "training": self.training,
            "history": [entry.to_json() for entry in self.history],
            "licence": self.licence,
            "tags": list(self.tags),
            "metrics": self.metrics,
        }
        data.update({name: value for name, value in optional.items() if value})
        return data

    def to_bytes(self) -> bytes:
        """Returns the file's bytes: the canonical JSON, in UTF-8."""
        return canonical_json(self.to_json()).encode("utf-8")

    @classmethod
    def from_json(cls, data: Any, *, file: str = MANIFEST_NAME) -> Manifest:
        """Reads a parsed manifest of any 1.x version.

        Args:
            data: the parsed JSON; use a strict parser, this cannot see duplicate keys any more.
            file: the file's name, for messages.

        Raises:
            UnsupportedVersionError: the major version is not 1.
            FormatError: anything else is wrong; every problem is collected.
        """
        problems: list[Problem] = []
        fields = Fields(data, loc="", file=file, problems=problems)
        version = _read_version(fields)
        base, base_extra = read_base(_block(fields, "base"))
        adapter = read_adapter(_block(fields, "method"), _block(fields, "targets"), base)
        files = tuple(FileRecord.read(item) for item in fields.objects("files", required=True))
        _refuse_repeated_files(fields, files)
        training = fields.mapping("training") or {}
        check_training(fields.nested(training, "training"))
        metrics = fields.mapping("metrics") or {}
        _check_metrics(fields.nested(metrics, "metrics"))
        manifest = cls(
            adapter=adapter,
            files=files,
            schema_version=version,
            digest=fields.text("digest", pattern=ADAPTER_DIGEST),
            training=training,
            history=tuple(HistoryEntry.read(item) for item in fields.objects("history")),
            licence=fields.text("licence"),
            tags=fields.texts("tags"),
            metrics=metrics,
            extra=fields.rest(),
            base_extra=base_extra,
        )
        if problems:
            raise FormatError(*problems)
        return manifest


def _block(fields: Fields, name: str) -> Fields:
    return fields.nested(fields.mapping(name, required=True) or {}, name)


def _read_version(fields: Fields) -> str:
    """Takes the schema version; what another major version says is not looked at any further."""
    version = fields.text("schema_version", required=True, pattern=_VERSION) or ""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise FormatError(*fields.problems)
    if match[1] != "1":
        raise UnsupportedVersionError.of(
            "schema-version",
            f"is {version!r}; this tool reads 1.x.",
            file=fields.file,
            loc="/schema_version",
            remedy="Use a version of adaptertool that knows this format.",
        )
    return version


def _refuse_repeated_files(fields: Fields, files: tuple[FileRecord, ...]) -> None:
    seen: set[str] = set()
    for index, item in enumerate(files):
        if item.path in seen:
            fields.nested({}, "files", index).complain("duplicate", f"{escape(item.path)!r} is listed twice.")
        seen.add(item.path)


def check_training(fields: Fields) -> None:
    """Checks the training facts that have a meaning; other fields are free."""
    fields.text("optimizer")
    ratio = fields.number("lora_plus_ratio")
    if ratio is not None and ratio <= 0:
        fields.complain("range", f"is {ratio}, expected more than 0.", at="lora_plus_ratio")
    galore = fields.mapping("galore")
    if galore is not None:
        inner = fields.nested(galore, "galore")
        inner.integer("rank", required=True, at_least=1)
        inner.integer("update_proj_gap", at_least=1)
        inner.number("scale")
    dataset = fields.raw("dataset")
    if dataset is None or (isinstance(dataset, str) and dataset):
        return
    for item in fields.objects("dataset"):
        item.text("id", required=True)
        item.text("revision")
        item.text("split")


def _check_metrics(fields: Fields) -> None:
    for name in fields.data:
        fields.number(name)
