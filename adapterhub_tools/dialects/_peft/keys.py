"""Tensor keys of a PEFT file: what is a wrapper's prefix, what is a module's path, what is a factor's role.

A key reads ``base_model.model.<path>.<suffix>``. Training stacks add parts of their own (``_orig_mod``,
``module``, the adapter's name), and a model wrapped twice repeats the prefix. Every such part is removed by a
rule that is reported; where two rules would give two tensors one name, that is a problem and nothing is
chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.tensor import TensorSpec

PREFIX = "base_model.model."
"""What PEFT puts before every path; repeated where a PEFT model was wrapped again."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile, FSDP and activation checkpointing put anywhere into a path."""


@dataclass(slots=True, kw_only=True)
class Keys:
    """The tensors of a file by their cleaned keys.

    Attributes:
        specs: cleaned key -> tensor as stored; keys of the whole model keep ``base_model.``.
        notes: the rules that were applied, with counts.
        problems: collisions and mixed forms.
        names: the adapter names that were found inside keys.
    """

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def clean(header: Mapping[str, TensorSpec], *, file: str) -> Keys:
    """Removes wrapper prefixes from every key of a file.

    Args:
        header: stored name -> tensor.
        file: the file's name, for messages.
    """
    keys = Keys()
    rules: Counter[str] = Counter()
    bare: list[str] = []
    for name, spec in header.items():
        key = _unwrap(name, rules)
        if not key.startswith(PREFIX) and not key.startswith("base_model."):
            bare.append(name)
        else:
            times = 0
            while key.startswith(PREFIX):
                key, times = key[len(PREFIX) :], times + 1
            if times > 1:
                rules[f'"{PREFIX}" repeated {times} times'] += 1
        other = keys.specs.get(key)
        if other is None:
            keys.specs[key] = spec
        else:
            keys.problems.append(_collision(name, other.name, key, file))
    for rule, count in sorted(rules.items()):
        keys.notes.append(f"Removed {rule} from {count} of {len(header)} keys of {file}.")
    if bare and len(bare) < len(header):
        message = (
            f'{len(bare)} of {len(header)} keys lack the prefix "{PREFIX}", the first is "{escape(bare[0])}".'
        )
        remedy = (
            "Save the adapter again with save_pretrained; a file that mixes two forms may mix two adapters."
        )
        keys.problems.append(Problem(kind="mixed-prefix", message=message, file=file, remedy=remedy))
    elif bare and not set(bare) <= _GLOBAL:
        keys.notes.append(f'No key of {file} has the prefix "{PREFIX}"; the paths were taken as they stand.')
    return keys


_GLOBAL = {"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}


def _unwrap(name: str, rules: Counter[str]) -> str:
    """Removes wrapper parts from one name and counts the rules used."""
    key = name
    for part in WRAPPERS:
        if part in key:
            parts = key.split(".")
            kept = [p for p in parts if p != part]
            if len(kept) < len(parts):
                rules[f'wrapper "{part}."'] += 1
                key = ".".join(kept)
    while key.startswith("module.") and key[len("module.") :].startswith(("module.", "base_model.")):
        rules['wrapper "module."'] += 1
        key = key[len("module.") :]
    return key


def _collision(name: str, other: str, key: str, file: str) -> Problem:
    message = f'"{escape(other)}" and "{escape(name)}" both mean "{escape(key)}".'
    remedy = "Remove one of them, or save the adapter again with save_pretrained."
    return Problem(kind="duplicate-key", message=message, file=file, loc=name, remedy=remedy)


class Roles:
    """A table of key suffixes, ready to look up.

    A suffix is written as its parts, ``*`` for any one part and a final ``**`` for any rest; each ``*`` in
    the role is replaced by the part that ``*`` stood for.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        """Indexes the table by the first part of each suffix."""
        self._by_first: dict[str, list[tuple[list[str], str]]] = {}
        for suffix, role in table.items():
            parts = suffix.split(".")
            self._by_first.setdefault(parts[0], []).append((parts, role))

    def find(self, key: str) -> tuple[str, str, str] | None:
        """Splits a key into path, role and the adapter's name where one stands in it; None if nothing fits.

        The last place that fits counts, as a base module may itself be called ``lora_A``.
        """
        parts = key.split(".")
        for start in range(len(parts) - 1, -1, -1):
            for suffix, role in self._by_first.get(parts[start], ()):
                tail = parts[start:]
                caught = _fit(suffix, tail)
                if caught is not None:
                    return ".".join(parts[:start]), _fill(role, caught), ""
                if len(tail) > 1:
                    caught = _fit(suffix, [tail[0], *tail[2:]])
                    if caught is not None:
                        return ".".join(parts[:start]), _fill(role, caught), tail[1]
        return None


def _fit(suffix: list[str], tail: list[str]) -> list[str] | None:
    """Returns what the stars stood for if the suffix describes the whole tail."""
    if suffix[-1] == "**":
        if len(tail) < len(suffix):
            return None
        tail = [*tail[: len(suffix) - 1], ".".join(tail[len(suffix) - 1 :])]
    if len(suffix) != len(tail):
        return None
    caught: list[str] = []
    for want, have in zip(suffix, tail, strict=True):
        if want in ("*", "**"):
            caught.append(have)
        elif want != have:
            return None
    return caught


def _fill(role: str, caught: list[str]) -> str:
    """Puts what the stars stood for into the role; a rest is appended."""
    for part in caught:
        role = role.replace("*", part, 1) if "*" in role else f"{role}.{part}"
    return role


Factors = dict[str, dict[str, TensorSpec]]
"""Module path -> role -> tensor."""


def split(keys: Keys, table: Mapping[str, str], *, file: str) -> tuple[Factors, dict[str, TensorSpec]]:
    """Divides the tensors into factors of modules and the rest.

    Args:
        keys: the cleaned keys; notes and problems are added to it.
        table: suffix -> role of the method.
        file: the file's name, for messages.

    Returns:
        The factors, and the tensors whose key no suffix fits, by cleaned key.
    """
    roles = Roles(table)
    factors: Factors = {}
    rest: dict[str, TensorSpec] = {}
    named = 0
    for key, spec in keys.specs.items():
        found = roles.find(key)
        if found is None:
            rest[key] = spec
            continue
        path, role, name = found
        if name:
            keys.names.add(name)
            named += 1
        have = factors.setdefault(path, {})
        if role in have:
            keys.problems.append(_collision(spec.name, have[role].name, f"{path}: {role}", file))
        else:
            have[role] = spec
    if len(keys.names) > 1:
        shown = ", ".join(f'"{escape(n)}"' for n in sorted(keys.names)[:5])
        message = f"the keys hold the names of {len(keys.names)} adapters: {shown}."
        remedy = "Save each adapter on its own with save_pretrained(selected_adapters=[...])."
        keys.problems.append(Problem(kind="several-adapters", message=message, file=file, remedy=remedy))
    elif keys.names:
        keys.notes.append(
            f'Removed the adapter name "{escape(min(keys.names))}" from {named} keys of {file}.'
        )
    return factors, rest


def without_base_layer(path: str) -> str:
    """Removes the parts ``base_layer`` that PEFT puts between a wrapper and what it wraps."""
    return (
        ".".join(part for part in path.split(".") if part != "base_layer") if "base_layer" in path else path
    )


def limited(problems: Iterable[Problem], per_kind: int = 100) -> tuple[Problem, ...]:
    """Returns at most ``per_kind`` problems of each kind, and how many more there were."""
    kept: list[Problem] = []
    counts: Counter[tuple[str, str]] = Counter()
    for problem in problems:
        counts[problem.kind, problem.severity] += 1
        if counts[problem.kind, problem.severity] <= per_kind:
            kept.append(problem)
    for (kind, severity), count in counts.items():
        if count > per_kind:
            message = f"{count - per_kind} more problems of this kind."
            kept.append(Problem(kind=kind, message=message, severity=severity))
    return tuple(kept)


def json_kind(value: Any) -> str:
    """Returns the JSON name of a value's type, for messages."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")
