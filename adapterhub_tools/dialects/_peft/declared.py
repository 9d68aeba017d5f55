"""What a PEFT config says that the file holds beside the factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.model.declared import Declared

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT saves for a task by itself; older configs do not list them."""


def from_config(config: Mapping[str, Any]) -> Declared:
    """Reads what a config declares; fields of a wrong type, reported elsewhere, count as absent."""
    rule = TargetRule.from_config(config)
    task = config.get("task_type")
    task = task if isinstance(task, str) else None
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return Declared(
        saved=tuple(dict.fromkeys(entry for entry in (*rule.modules_to_save, *heads_of(config)) if entry)),
        bias=_bias(config.get("bias")),
        tokens=_tokens(config.get("trainable_token_indices")),
        entries=rule.entries if isinstance(rule.target_modules, tuple) else (),
        task=task,
        model_class=name if isinstance(name, str) else None,
    )


def heads_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the heads that PEFT saves for the config's task, listed or not."""
    task = config.get("task_type")
    return TASK_HEADS.get(task, ()) if isinstance(task, str) else ()


def _bias(value: object) -> str:
    if value == "all":
        return "all"
    return "targets" if isinstance(value, str) and value.endswith("_only") else "none"


def _tokens(value: object) -> dict[str, tuple[int, ...]]:
    """Returns the entries of a dictionary; a list means the input embedding, which the file alone shows."""
    if not isinstance(value, dict):
        return {}
    return {
        name: tuple(i for i in rows if isinstance(i, int))
        for name, rows in value.items()
        if isinstance(name, str) and isinstance(rows, list)
    }
