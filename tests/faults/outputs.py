"""What stands at an output: nothing, the old folder, or a complete new one; anything else is a mix."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.model.receipt import RECEIPT_FILE
from adapterhub_tools.store.checkpoint import open_checkpoint
from adapterhub_tools.store.digest import digest_checkpoint, root_digest

Tree = dict[str, str]


def tree_of(folder: Path) -> Tree | None:
    """Returns path -> SHA-256 of every file, ``"folder"`` for a folder; None where there is nothing."""
    if not folder.exists():
        return None
    return {
        path.relative_to(folder).as_posix(): (
            "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
    }


def check_receipt(folder: Path) -> dict[str, Any]:
    """Checks every file and tensor of an output against its receipt, and that nothing else is there."""
    receipt: dict[str, Any] = json.loads((folder / RECEIPT_FILE).read_text())
    output = receipt["output"]
    checkpoint = open_checkpoint(folder)
    digests = digest_checkpoint(checkpoint, threads=1)
    assert {name: digest.hex() for name, digest in digests.items()} == {
        name: tensor["digest"] for name, tensor in output["tensors"].items()
    }
    assert root_digest(output["digest"].partition(":")[0], digests) == output["digest"]
    for name, record in output["files"].items():
        assert (folder / name).stat().st_size == record["size"], name
    for name, record in output["side_files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"], name
    undo = {}
    if "undo" in output:
        undo = {output["undo"]["file"]: output["undo"]["sha256"]}
        for name, digest in undo.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    index = {"model.safetensors.index.json"} if len(output["files"]) > 1 else set()
    written = {*output["files"], *output["side_files"], *index, *undo, RECEIPT_FILE}
    assert set(tree_of(folder) or {}) == written
    return receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class InputState:
    """What inputs are: digest, size, mode, modification time and inode of every file and folder."""

    entries: dict[str, tuple[str, int, int, int, int]]

    @classmethod
    def of(cls, *folders: Path) -> InputState:
        entries = {}
        for folder in folders:
            for path in (folder, *sorted(folder.rglob("*"))):
                status = path.stat()
                digest = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
                entries[str(path)] = (
                    digest,
                    status.st_size,
                    status.st_mode,
                    status.st_mtime_ns,
                    status.st_ino,
                )
        return cls(entries=entries)
