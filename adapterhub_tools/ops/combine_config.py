"""The config of a combined adapter: what all inputs agree on, and targets that mean what was combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import escape
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.store.digest import file_sha256
from adapterhub_tools.store.side_files import classify

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_COMMON = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "modules_to_save")
_DECIDED = (
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "ensure_weight_tying",
    *_NARROWING,
)
"""Fields that the combination decides, so that inputs which differ in them are no news."""
_ABSENT: Any = object()


def common_config(
    inputs: Sequence[CombineInput],
    paths: Sequence[str],
    *,
    complete: bool,
    tokens: Mapping[str, Sequence[int]],
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the config to begin with, and notes on fields that were dropped.

    Args:
        inputs: the adapters, in any order.
        paths: the modules of the output.
        complete: whether they are all modules that the inputs have.
        tokens: path of an embedding -> its trained rows.
    """
    configs = [dict(item.opened.adapter.unparsed.get("config", {})) for item in inputs]
    lora = all(str(config.get("peft_type", "LORA")).upper() == "LORA" for config in configs)
    names = sorted({name for config in configs for name in config}) if lora else list(_COMMON)
    found: dict[str, Any] = {}
    differing = []
    for name in names:
        values = [_plain(config.get(name, _ABSENT)) for config in configs]
        if name in _DECIDED:
            continue
        if name == "base_model_name_or_path":
            known = {value for value in values if isinstance(value, str) and value}
            found[name] = known.pop() if len(known) == 1 else None
        elif all(value == values[0] for value in values):
            if values[0] is not _ABSENT:
                found[name] = values[0]
        elif name != "modules_to_save":
            differing.append(name)
    found["peft_type"] = "LORA"
    found["init_lora_weights"] = True
    bias = {config.get("bias", "none") for config in configs}
    found["bias"] = "all" if "all" in bias else "none"
    found.update(_targets(configs, paths, complete=complete))
    if tokens:
        found["trainable_token_indices"] = {path: list(rows) for path, rows in tokens.items()}
    notes = _base_notes(inputs, configs)
    if differing:
        notes.append(f"the configs differ in {', '.join(differing)}, so PEFT's defaults are written")
    return found, tuple(notes)


def _base_notes(inputs: Sequence[CombineInput], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tells where configs name different bases: names alone do not say whether the weights differ."""
    named = {
        item.label: value
        for item, config in zip(inputs, configs, strict=True)
        if isinstance(value := config.get("base_model_name_or_path"), str) and value
    }
    if len(set(named.values())) < 2:
        return []
    says = ", ".join(f"{escape(label)} {escape(value)}" for label, value in named.items())
    return [
        f"the configs name different bases ({says}), so the result names none; deltas of different weights "
        "have nothing in common"
    ]


def common_side(inputs: Sequence[CombineInput]) -> tuple[Path | None, tuple[str, ...]]:
    """Returns a folder whose tokenizer and licence go along, if all have the same; else None and a note."""
    found = []
    for item in inputs:
        root = item.opened.files.root
        names = classify(root).copy if item.path.is_dir() else ()
        found.append({name: file_sha256(root / name) for name in names})
    if all(files == found[0] for files in found):
        return (inputs[0].opened.files.root if found[0] else None), ()
    left = sorted({name for files in found for name in files})
    return None, (f"not the same beside all adapters, so left behind: {', '.join(left)}",)


def _targets(configs: Sequence[Mapping[str, Any]], paths: Sequence[str], *, complete: bool) -> dict[str, Any]:
    """Returns target rules: the inputs' own where they mean exactly these modules, else every path."""
    kept = {name: [_plain(config.get(name)) for config in configs] for name in _NARROWING}
    same = {name: values[0] for name, values in kept.items() if all(v == values[0] for v in values)}
    narrow = any(value for values in kept.values() for value in values)
    targets = [_plain(config.get("target_modules")) for config in configs]
    if complete and len(same) == len(kept) and all(target == targets[0] for target in targets):
        rule = {} if targets[0] is None else {"target_modules": targets[0]}
        return {**rule, **{name: value for name, value in same.items() if value is not None}}
    if complete and not narrow and all(isinstance(target, list) for target in targets):
        return {"target_modules": sorted({name for target in targets for name in target})}
    return {"target_modules": sorted(paths)}


def _plain(value: Any) -> Any:
    """Returns a list of names in order: PEFT saves sets, whose order is chance."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value
