"""Variants of mergeable PEFT types that cannot be merged: by the config, or by what the file leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from adapterhub_tools.dialects._peft.blockers import Blocker

_SAVE_ALL = (
    "Load it with PEFT on the machine that trained it and save it again with {0}; the file then has them."
)


_MERGE_WITH_PEFT = "Merge it with PEFT (merge_and_unload) onto the very base that it was trained on."

_NOT_IN_THE_FILE = {
    "ADAMSS": "the subspaces of the base weights that its factors act in are found by clustering when PEFT "
    "loads it, and are not in the file",
    "FROD": "its factors act in a joint decomposition of the base weights that PEFT makes when it loads it",
    "OSF": "the large singular components of the base weights, which PEFT computes when it loads it, are not "
    "in the file",
    "PSOFT": "it turns the singular subspace of the base weights that PEFT computes when it loads it, whose "
    "signs are not in the file",
    "TINYLORA": "which of its shared vectors a module uses depends on the order of all modules in the "
    "model's class",
    "GLORA": "the change of a bias depends on the weight beside it",
    "PEANUT": "it is a network that takes the base weight as its input, with any activation of transformers",
}
"""Types that PEFT can merge and this tool does not: why."""


def not_merged(name: str) -> list[Blocker]:
    """Returns a blocker for a type that PEFT can merge, but not from its files and the base's alone."""
    if name not in _NOT_IN_THE_FILE:
        return []
    return [("method", f"{name} cannot be merged here: {_NOT_IN_THE_FILE[name]}.", _MERGE_WITH_PEFT)]


def variant_blockers(name: str, config: Mapping[str, Any], roles: Set[str]) -> list[Blocker]:
    """Returns why an adapter of a mergeable type cannot be merged as it stands.

    Args:
        name: its ``peft_type``.
        config: its config.
        roles: the roles of the factors in its file.
    """
    if not roles:
        return []
    if name == "OFT":
        return _oft(config)
    if name == "RANDLORA" and not {"shared_A", "shared_B"} <= roles:
        message = (
            "the random bases are not in the file. PEFT makes them in the 16-bit type that the processor of "
            "the training run supports, and divides them by a deviation whose last bits depend on it."
        )
        return [("not-reproducible", message, _SAVE_ALL.format("save_projection=True"))]
    if name == "UNILORA" and "indices_A" not in roles:
        message = (
            "the places of the shared numbers are not in the file; they depend on the order of all modules "
            "in the model's class."
        )
        return [("not-reproducible", message, _SAVE_ALL.format("save_indices=True"))]
    if name == "PVERA" and config.get("sample_at_inference") is not False:
        message = (
            '"sample_at_inference" is not false, so the model draws noise for every input; no single weight '
            "stands for it."
        )
        remedy = "Set it to false in a copy of the config to merge the mean of the distribution."
        return [("unmergeable", message, remedy)]
    return []


def _oft(config: Mapping[str, Any]) -> list[Blocker]:
    """OFT changed its parameters twice: PEFT refuses the first form and only warns of the second."""
    retrain = "Merge it with the version of PEFT that trained it (merge_and_unload)."
    if config.get("oft_block_size") is None:
        message = (
            '"oft_block_size" is absent: the adapter is of PEFT 0.13 or older, whose OFT was another method.'
        )
        return [("old-form", message, retrain)]
    series = config.get("use_cayley_neumann")
    if series is None:
        message = (
            '"use_cayley_neumann" is absent: the adapter was trained before it existed, with the exact '
            "transform, but PEFT now reads it as true."
        )
        return [
            ("old-form", message, "Set it to false in a copy of the config if that is how it was trained.")
        ]
    if series is True and _version(config.get("peft_version")) < (0, 18):
        message = (
            "the series of use_cayley_neumann is another one since PEFT 0.18, and the config's peft_version "
            f"is {config.get('peft_version') or 'absent, as before 0.18'}."
        )
        return [("old-form", message, retrain)]
    return []


def _version(text: object) -> tuple[int, int]:
    parts = text.split(".")[:2] if isinstance(text, str) else []
    numbers = [int(part) for part in parts if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
