"""Hyperparameters of single modules, for every PEFT type but LoRA: patterns and feedforward layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_tools.dialects._peft.config import PeftType
from adapterhub_tools.dialects._peft.patterns import Pattern, key_matches, matches
from adapterhub_tools.errors import FormatError, Problem

FIELD_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "psoft_alpha": "alpha",
    "randlora_alpha": "alpha",
    "shadow_alpha": "alpha",
    "scaling": "scale",
}
"""Config field -> hyperparameter; ``scaling`` is the name of a rule in this package."""

_PATTERNS = {"rank_pattern": "r"}
"""Pattern field -> the field that it overrides, where that is not its name without ``_pattern``."""

_FEEDFORWARD = "feedforward_modules"


def hyperparameters(config: Mapping[str, Any], kind: PeftType) -> dict[str, Any]:
    """Returns the config fields that enter the maths of this type; a rank of 0 is none (OFT)."""
    found = {FIELD_NAMES.get(name, name): config[name] for name in kind.maths if config.get(name) is not None}
    if found.get("rank") == 0:
        del found["rank"]
    return found


def of_modules(
    config: Mapping[str, Any], kind: PeftType, paths: Sequence[str], *, file: str
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Returns the hyperparameters of each module.

    A pattern whose values are numbers overrides its field for the modules that it matches, as in PEFT
    (``get_pattern_key``); AdaLoRA's rank pattern, lists of booleans that were applied when the file was
    written, has no further effect. ``feedforward_modules`` becomes ``"feedforward"``: whether the module is
    one of them.

    Args:
        config: the adapter's config.
        kind: its type.
        paths: the modules.
        file: the config file, for messages.
    """
    whole = hyperparameters(config, kind)
    problems: list[Problem] = []
    overrides: list[tuple[str, list[Any]]] = []
    for name in kind.maths:
        field = _PATTERNS.get(name, name.removesuffix("_pattern"))
        pattern = config.get(name)
        if not name.endswith("_pattern") or field not in kind.maths:
            continue
        whole.pop(name, None)
        if isinstance(pattern, dict) and pattern and all(_is_number(value) for value in pattern.values()):
            values = _resolve(pattern, paths, file, name, problems)
            overrides.append((FIELD_NAMES.get(field, field), values))
    if kind.method == "adalora":
        whole.pop("rank_pattern", None)
    if _FEEDFORWARD in kind.maths and config.get(_FEEDFORWARD) is not None:
        whole.pop(_FEEDFORWARD, None)
        overrides.append(("feedforward", _feedforward(config[_FEEDFORWARD], paths, file, problems)))
    settings = [dict(whole) for _ in paths]
    for field, values in overrides:
        for own, value in zip(settings, values, strict=True):
            if value is not None:
                own[field] = value
    return settings, problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _resolve(
    pattern: Mapping[str, Any], paths: Sequence[str], file: str, name: str, problems: list[Problem]
) -> list[Any]:
    """Returns the value for each path, None where no key matches; a key may also be the path itself."""
    keys = list(pattern)
    try:
        found = key_matches(keys, paths, file=file, loc=name)
    except FormatError as error:
        problems.extend(error.problems)
        return [None] * len(paths)
    return [
        pattern[keys[hits[0]]] if hits else pattern.get(path) for path, hits in zip(paths, found, strict=True)
    ]


def _feedforward(value: object, paths: Sequence[str], file: str, problems: list[Problem]) -> list[Any]:
    """Tells which modules are feedforward: a regular expression for the path, or ends of paths."""
    if isinstance(value, str):
        try:
            return list(matches(Pattern(text=value, mode="fullmatch", file=file, loc=_FEEDFORWARD), paths))
        except FormatError as error:
            problems.extend(error.problems)
            return [None] * len(paths)
    ends = tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
    return [path.endswith(ends) for path in paths]
