"""What a PEFT config says, checked: types of the fields, unknown fields, the base it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterhub_tools.dialects._peft.keys import json_kind
from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.base import BaseRef


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftType:
    """A row of types.json: one ``peft_type``.

    Attributes:
        name: the ``peft_type``, such as ``"LOHA"``.
        method: the method's name in this package, such as ``"loha"``.
        merge: how a merge would work in principle: ``"additive"`` (adapter only), ``"base"`` (needs the base
            weight), ``"rows"``, ``"replace"``, ``"bias"``, or ``"none"``.
        reason: why not, for ``"none"``.
        roles: key suffix -> role of a factor.
        maths: the config fields that enter the maths.
        fields: every field that PEFT has known for this type, common fields aside.
    """

    name: str
    method: str
    merge: str
    reason: str
    roles: dict[str, str]
    maths: tuple[str, ...]
    fields: frozenset[str]


@lru_cache(maxsize=1)
def table() -> tuple[dict[str, PeftType], frozenset[str]]:
    """Returns every known ``peft_type`` and the fields that all of them share."""
    data = json.loads(Path(__file__).with_name("types.json").read_text(encoding="utf-8"))
    rows = {
        name: PeftType(
            name=name,
            method=row["method"],
            merge=row["merge"],
            reason=row.get("reason", ""),
            roles=row["roles"],
            maths=tuple(row["maths"]),
            fields=frozenset(row["fields"]),
        )
        for name, row in data["types"].items()
    }
    return rows, frozenset(data["common_fields"])


_BOOLEANS = ("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_LISTS = ("modules_to_save", "target_parameters")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_BIASES = ("none", "all", "lora_only")


def check_fields(config: Mapping[str, Any], kind: PeftType, *, file: str) -> tuple[list[Problem], list[str]]:
    """Checks the names of all fields, and for LoRA the types of those that decide what is merged.

    Returns:
        Problems, and notes on unknown fields that say nothing (null, false, empty).
    """
    problems: list[Problem] = []
    notes: list[str] = []
    known = kind.fields | table()[1]
    for name in sorted(set(config) - known):
        value = config[name]
        if value is None or value is False or value in ("", [], {}):
            notes.append(f'Ignored the unknown field "{escape(name)}" of {file}; it is empty.')
            continue
        message = (
            f'unknown field "{escape(name)}" ({json_kind(value)}) for {kind.name}; it may change the maths.'
        )
        remedy = (
            "Use a newer adaptertool if PEFT added it; if it is a remark of your own, remove it from the "
            "config."
        )
        problems.append(Problem(kind="unknown-field", message=message, file=file, loc=name, remedy=remedy))
    problems.extend(_lora_types(config, file) if kind.name == "LORA" else _other_types(config, kind, file))
    return problems, notes


def _wrong_type(config: Mapping[str, Any], name: str, expected: str, file: str) -> Problem:
    value = config.get(name)
    shown = f" {escape(json.dumps(value))}" if not isinstance(value, (list, dict)) else ""
    message = f'"{name}" is {json_kind(value)}{shown}; expected {expected}.'
    remedy = f'Correct "{name}" in {file}.'
    return Problem(kind="config-type", message=message, file=file, loc=name, remedy=remedy)


def _other_types(config: Mapping[str, Any], kind: PeftType, file: str) -> list[Problem]:
    """Checks rank and alpha of the other types, under whatever name they have them."""
    problems = []
    for name in kind.maths:
        value = config.get(name)
        if value is None:
            continue
        if name == "r" and (not _is_int(value) or value < 0):
            problems.append(_wrong_type(config, name, "an integer of at least 0", file))
        elif name.endswith("alpha") and not _is_number(value):
            problems.append(_wrong_type(config, name, "a number", file))
    return problems


def _lora_types(config: Mapping[str, Any], file: str) -> list[Problem]:
    """Checks the types of LoRA's fields; null always means the default."""
    problems: list[Problem] = []

    def need(name: str, good: bool, expected: str) -> None:
        if config.get(name) is not None and not good:
            problems.append(_wrong_type(config, name, expected, file))

    need("r", _is_int(config.get("r")), "an integer")
    need("lora_alpha", _is_number(config.get("lora_alpha")), "a number")
    for name in _BOOLEANS:
        need(name, isinstance(config.get(name), bool), "a boolean")
    for name in _NAMES:
        value = config.get(name)
        need(name, isinstance(value, str) or _is_list(value, str), "a string or an array of strings")
    for name in _LISTS:
        need(name, _is_list(config.get(name), str), "an array of strings")
    for name in _PATTERNS:
        value = config.get(name)
        test = _is_int if name == "rank_pattern" else _is_number
        good = isinstance(value, dict) and all(test(v) for v in value.values())
        need(name, good, "an object of numbers" if test is _is_number else "an object of integers")
    value = config.get("layers_to_transform")
    need("layers_to_transform", _is_int(value) or _is_list(value, int), "an integer or an array of integers")
    need("bias", config.get("bias") in _BIASES, "one of " + ", ".join(f'"{b}"' for b in _BIASES))
    value = config.get("init_lora_weights")
    need("init_lora_weights", isinstance(value, (bool, str)), "a boolean or a string")
    value = config.get("trainable_token_indices")
    indices = list(value.values()) if isinstance(value, dict) else [value]
    need(
        "trainable_token_indices",
        all(_is_list(item, int) for item in indices),
        "an array of integers, or an object of them",
    )
    if isinstance(config.get("target_modules"), str):
        for name in ("layers_to_transform", "layers_pattern"):
            need(name, not config.get(name), 'null, because "target_modules" is a regular expression')
    return problems


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: object, item: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, item) and not isinstance(v, bool) for v in value)


def base_ref(config: Mapping[str, Any]) -> BaseRef | None:
    """Returns the base that a config names, or None where it names none (null or empty)."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    id_ = name if isinstance(name, str) and name else None
    revision = revision if isinstance(revision, str) and revision else None
    return BaseRef(id=id_, revision=revision) if id_ is not None else None
