"""The receipt of a merge: what went in, what was asked, what came out; the same wherever the merge runs.

No time, path, host, device or thread count: two merges that must be equal have equal receipts, byte for byte.
Specified in docs/receipt.md and ``schema/merge-receipt-1.0.schema.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub_tools.model.combination import CombinationChoice
from adapterhub_tools.model.undo import UNDO_FILE

RECEIPT_FILE = "merge_receipt.json"
RECEIPT_VERSION = "1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptAdapter:
    """One adapter of a merge.

    Attributes:
        digest: the adapter digest.
        method: the method's name.
        scale: the caller's multiplier.
        targets: how many modules it changed.
        full: how many tensors it carried in full.
        guarantee: ``"exact"`` or ``"tolerance"``, its method's.
    """

    digest: str
    method: str
    scale: float
    targets: int
    full: int
    guarantee: str = "exact"

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierMerge:
    """A merge as those that were made on top of it remember it.

    Attributes:
        digest: the content digest of what it wrote.
        adapters: its adapters, in the order given.
        options: what was asked that changed the result.
        undo: whether it wrote an undo file.
    """

    digest: str
    adapters: tuple[ReceiptAdapter, ...]
    options: dict[str, Any]
    undo: bool

    @property
    def combination(self) -> CombinationChoice | None:
        """How the adapters were combined; None where they were added up."""
        found = self.options.get("combination")
        return None if found is None else CombinationChoice.from_json(found)

    def to_json(self) -> dict[str, Any]:
        """Returns every field."""
        return {
            "digest": self.digest,
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "options": self.options,
            "undo": self.undo,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EarlierMerge:
        """Reads what ``to_json`` wrote."""
        adapters = tuple(ReceiptAdapter(**item) for item in data["adapters"])
        return cls(digest=data["digest"], adapters=adapters, options=data["options"], undo=data["undo"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptBase:
    """The base of a merge.

    Attributes:
        digest: of all its tensors; None where the check was not ``full``.
        targets_digest: of the tensors that the adapters change; None where the check was ``off``.
        config_digest: of its config; None where it has none.
        checked: what a manifest's record was compared with: ``"full"``, ``"targets"``, ``"off"`` or
            ``"unrecorded"`` (no manifest names a digest).
        earlier: the merges that made it, the latest first, as its own receipt tells.
    """

    digest: str | None
    targets_digest: str | None
    config_digest: str | None
    checked: str
    earlier: tuple[EarlierMerge, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns every field; ``earlier`` only where there is some."""
        data = {
            "digest": self.digest,
            "targets_digest": self.targets_digest,
            "config_digest": self.config_digest,
            "checked": self.checked,
        }
        return {**data, "earlier": [merge.to_json() for merge in self.earlier]} if self.earlier else data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReceiptBase:
        """Reads what ``to_json`` wrote."""
        earlier = tuple(EarlierMerge.from_json(item) for item in data.get("earlier", ()))
        return cls(**{**data, "earlier": earlier})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptTensor:
    """A written tensor.

    Attributes:
        name: its name.
        dtype: its safetensors dtype.
        shape: its shape.
        digest: its tensor digest in hexadecimal.
        action: ``"copy"``, ``"cast"``, ``"merge"`` or ``"replace"``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    action: str

    def to_json(self) -> dict[str, Any]:
        """Returns every field but the name, which is the key."""
        return {"dtype": self.dtype, "shape": list(self.shape), "digest": self.digest, "action": self.action}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptUndo:
    """The undo file of a merge.

    Attributes:
        size: its bytes.
        sha256: of them, in hexadecimal.
    """

    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Returns every field, and the file's name."""
        return {"file": UNDO_FILE, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a merge did.

    Attributes:
        tool_version: of adaptertool.
        base: the base.
        adapters: the adapters, in the order given.
        options: what was asked that changes the result.
        guarantee: ``"exact"`` if every adapter's is, else ``"tolerance"``.
        digest: the content digest of the written checkpoint.
        config_digest: of the written config; None where there is none.
        files: weight file -> size in bytes.
        side_files: other file -> SHA-256.
        tensors: every written tensor, by name.
        notes: what was decided by rule.
        undo: the undo file, if one was asked for.
    """

    tool_version: str
    base: ReceiptBase
    adapters: tuple[ReceiptAdapter, ...]
    options: dict[str, Any]
    guarantee: str
    digest: str
    config_digest: str | None
    files: dict[str, int]
    side_files: dict[str, str]
    tensors: tuple[ReceiptTensor, ...]
    notes: tuple[str, ...]
    undo: ReceiptUndo | None = None

    @property
    def combination(self) -> CombinationChoice | None:
        """How the adapters were combined; None where they were added up."""
        return self.own.combination

    @property
    def own(self) -> EarlierMerge:
        """This merge, as later ones remember it."""
        return EarlierMerge(
            digest=self.digest,
            adapters=self.adapters,
            options=self.options,
            undo=self.undo is not None,
        )

    @property
    def standing(self) -> tuple[EarlierMerge, ...]:
        """The merges that are in these weights, the latest first: an approximate undoing takes one off."""
        found: list[EarlierMerge] = []
        for merge in reversed((self.own, *self.base.earlier)):
            if "approximates_base_of" not in merge.options:
                found.append(merge)
            elif found:
                found.pop()
        return tuple(reversed(found))

    def to_json(self) -> dict[str, Any]:
        """Returns the receipt as it stands in the file."""
        return {
            "schema_version": RECEIPT_VERSION,
            "operation": "merge",
            "tool": {"name": "adaptertool", "version": self.tool_version},
            "base": self.base.to_json(),
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "options": self.options,
            "guarantee": self.guarantee,
            "output": {
                "digest": self.digest,
                "config_digest": self.config_digest,
                "files": {name: {"size": size} for name, size in self.files.items()},
                "side_files": {name: {"sha256": digest} for name, digest in self.side_files.items()},
                "tensors": {tensor.name: tensor.to_json() for tensor in self.tensors},
                **({} if self.undo is None else {"undo": self.undo.to_json()}),
            },
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Receipt:
        """Reads what ``to_json`` wrote; the caller has checked it against the schema."""
        output = data["output"]
        undo = output.get("undo")
        return cls(
            tool_version=data["tool"]["version"],
            base=ReceiptBase.from_json(data["base"]),
            adapters=tuple(ReceiptAdapter(**item) for item in data["adapters"]),
            options=data["options"],
            guarantee=data["guarantee"],
            digest=output["digest"],
            config_digest=output["config_digest"],
            files={name: item["size"] for name, item in output["files"].items()},
            side_files={name: item["sha256"] for name, item in output["side_files"].items()},
            tensors=tuple(
                ReceiptTensor(
                    name=name,
                    dtype=item["dtype"],
                    shape=tuple(item["shape"]),
                    digest=item["digest"],
                    action=item["action"],
                )
                for name, item in output["tensors"].items()
            ),
            notes=tuple(data["notes"]),
            undo=None if undo is None else ReceiptUndo(size=undo["size"], sha256=undo["sha256"]),
        )
