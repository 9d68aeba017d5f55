"""Accounts for what lies beside the weights of a merged model: config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import Problem
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.ops.tied import text_config
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.digest import IGNORED_CONFIG_KEYS
from adapterhub_tools.store.files import resolve_inside
from adapterhub_tools.store.side_files import classify, is_tokenizer_file


def account_config(
    base: Checkpoint, merged: Checkpoint, planned: MergePlan
) -> tuple[list[Problem], list[str]]:
    """Returns which values of the config are wrong, and what else is different.

    Values that both configs have must agree, but for what the merge changes (tying, vocabulary). Keys that
    only one has are noted: tools write defaults out, or leave them out.
    """
    if base.config is None or merged.config is None:
        missing = "the base" if base.config is None else "the merged model"
        return [], [f"config: {missing} has none"]
    expected: dict[str, Any] = json.loads(json.dumps(base.config))
    if planned.ties.untied:
        for holder in [
            part for part in (expected, text_config(expected)) if "tie_word_embeddings" in part
        ] or [expected]:
            holder["tie_word_embeddings"] = False
    if planned.rows is not None:
        (expected if "vocab_size" in expected else text_config(expected))["vocab_size"] = planned.rows
    problems, notes = [], []
    for key in sorted({*expected, *merged.config} - set(IGNORED_CONFIG_KEYS)):
        if key not in merged.config:
            notes.append(f"config: {key} is left out")
        elif key not in expected:
            notes.append(f"config: {key} is added")
        elif expected[key] != merged.config[key]:
            problems.append(
                Problem(
                    kind="config",
                    message=f"{key} is {_short(merged.config[key])}, expected {_short(expected[key])}.",
                    file="config.json",
                    loc=f"/{key}",
                    remedy="Use the base's value: with another config the same weights are another model.",
                )
            )
    return problems, notes or ["config: as the base's"]


def account_tokenizer(base: Checkpoint, merged: Checkpoint, parts: Sequence[Part]) -> list[str]:
    """Returns what became of each tokenizer file: the base's, an adapter's, another, missing, added."""
    own = {name for name in classify(base.root).copy if is_tokenizer_file(name)}
    found = {name for name in classify(merged.root).copy if is_tokenizer_file(name)}
    groups: dict[str, list[str]] = {}
    for name in sorted(own | found):
        if name not in found:
            state = "left out"
        elif name in own and _same(base.root, merged.root, name):
            state = "as the base's"
        elif any(_same(part.opened.files.root, merged.root, name) for part in parts):
            state = "the adapter's"
        else:
            state = "neither the base's nor the adapter's" if name in own else "added"
        groups.setdefault(state, []).append(name)
    return [f"tokenizer: {', '.join(names)}: {state}" for state, names in groups.items()]


def _same(first: Path, second: Path, name: str) -> bool:
    """Says whether two folders have the same file, or the same JSON in another spelling."""
    paths = [resolve_inside(root, name) for root in (first, second)]
    if not all(path.is_file() for path in paths):
        return False
    contents = [path.read_bytes() for path in paths]
    if contents[0] == contents[1]:
        return True
    if not name.endswith(".json"):
        return False
    try:
        return bool(json.loads(contents[0]) == json.loads(contents[1]))
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
