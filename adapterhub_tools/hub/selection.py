"""Which files travel with an adapter: an allow-list, so that nothing unknown is sent or fetched."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adapterhub_tools.model.manifest import MANIFEST_NAME
from adapterhub_tools.store.adapter_files import CONFIG_FILE
from adapterhub_tools.store.folder import PICKLE_SUFFIXES
from adapterhub_tools.store.side_files import is_side_file, is_tokenizer_file

CARD_NAME = "README.md"
INDEX_SUFFIX = ".safetensors.index.json"

_WEIGHTS = re.compile(r"[^/]+\.safetensors")
_LICENCE = re.compile(r"(?i:licen[sc]e|copying|notice|use_policy|acceptable_use_policy)(?:[._-][\w.-]*)?")
_SIGNATURE = re.compile(re.escape(MANIFEST_NAME) + r"\.(?:sig|sigstore|sigstore\.json|asc|intoto\.jsonl)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Files by name.

    Attributes:
        taken: names that travel, sorted.
        left: names that stay, each with the reason, sorted.
    """

    taken: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def is_signature(name: str) -> bool:
    """Returns whether a name is that of a detached signature of the manifest."""
    return _SIGNATURE.fullmatch(name) is not None


def select_adapter(names: Iterable[str], include: Collection[str] = ()) -> Selection:
    """Returns which files of an adapter travel.

    Args:
        names: paths relative to the adapter's folder.
        include: paths that travel although the list does not have them.
    """
    return _select(names, include, _adapter_reason)


def select_base(names: Collection[str], shards: Collection[str]) -> Selection:
    """Returns which files of a base travel.

    Args:
        names: paths relative to its folder.
        shards: its weights, which the caller chose, and their index.
    """
    return _select(
        names, shards, lambda name: "" if is_side_file(name) else "not on the list of files of a model"
    )


def weights_of_base(names: Collection[str]) -> tuple[str, ...] | None:
    """Returns the index of a base, or its single weight file; None if neither is there."""
    for stem in ("model", "diffusion_pytorch_model"):
        for name in (stem + INDEX_SUFFIX, stem + ".safetensors"):
            if name in names:
                return (name,)
    single = [name for name in names if _WEIGHTS.fullmatch(name)]
    return tuple(single) if len(single) == 1 else None


def _select(names: Iterable[str], include: Collection[str], reason_of: object) -> Selection:
    assert callable(reason_of)
    reasons = {name: "" if name in include else str(reason_of(name)) for name in sorted(set(names))}
    return Selection(
        taken=tuple(name for name, reason in reasons.items() if not reason),
        left=tuple((name, reason) for name, reason in reasons.items() if reason),
    )


def _adapter_reason(name: str) -> str:
    """Returns why a file stays behind, or an empty string if it travels."""
    if name in (CONFIG_FILE, MANIFEST_NAME, CARD_NAME) or is_signature(name):
        return ""
    if _WEIGHTS.fullmatch(name) or _LICENCE.fullmatch(name) or is_tokenizer_file(name):
        return ""
    if name.endswith(PICKLE_SUFFIXES):
        return f"a Python pickle or unknown binary data (--include {name} takes it)"
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    return "not on the list of files of an adapter"
