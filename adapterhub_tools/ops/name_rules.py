"""The rules that take module names in memory to tensor names on disk; one of them must fit every module."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.adapter import Adapter

WRAPPERS = ("0.auto_model.", "auto_model.", "base_model.", "model.")
"""Attribute names under which others keep the model: sentence-transformers, and wrapper classes."""

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """A way from module names in memory to names on disk: strip one prefix, then add another.

    Attributes:
        words: the rule for people.
        strip: what is taken off.
        add: what is put before.
    """

    words: str
    strip: str = ""
    add: str = ""

    def to_disk(self, path: str, stored: Collection[str]) -> str:
        """Returns the module's name on disk; a head that stands beside the base model keeps its own."""
        if self.strip and path.startswith(self.strip):
            path = path.removeprefix(self.strip)
        added = self.add + path
        return path if self.add and f"{added}.weight" not in stored and f"{path}.weight" in stored else added

    def to_memory(self, path: str) -> str:
        """Returns the module's name in memory."""
        if self.add and path.startswith(self.add):
            path = path.removeprefix(self.add)
        return self.strip + path


def choose_rule(adapter: Adapter, stored: Collection[str], prefix: str, problems: list[Problem]) -> NameRule:
    """Returns the rule under which every module of an adapter has a weight in the base.

    Args:
        adapter: the adapter.
        stored: the base's tensor names, and those that its ties imply.
        prefix: the attribute under which the base's architecture holds the bare model; empty if unknown.
        problems: gets what is wrong: modules that no rule places, or rules that disagree.
    """
    paths = [module.path for module in adapter.modules]
    if not paths:
        paths = [item.target.rpartition(".")[0] for item in adapter.full]
    inner = f"{prefix}." if prefix else ""
    rules = [NameRule(words="as they are")]
    for wrapper in ("", *WRAPPERS):
        said = f"'{wrapper}' taken off" if wrapper else ""
        if wrapper:
            rules.append(NameRule(words=said, strip=wrapper))
        if inner:
            rules.append(NameRule(words=_join(said, f"'{inner}' put before"), strip=wrapper, add=inner))
            if wrapper + inner != wrapper:
                rules.append(NameRule(words=f"'{wrapper}{inner}' taken off", strip=wrapper + inner))
    found = [(sum(f"{r.to_disk(p, stored)}.weight" in stored for p in paths), r) for r in rules]
    best = max(count for count, _ in found)
    winners = [r for count, r in found if count == best]
    if best < len(paths):
        if adapter.modules:
            problems.extend(_unresolved(paths, winners[0], stored))
        return winners[0]
    if winners[0].words == "as they are":
        return winners[0]
    ways = {tuple(r.to_disk(p, stored) for p in paths): r for r in reversed(winners)}
    if len(ways) > 1:
        problems.append(
            Problem(
                kind="ambiguous-names",
                message=f"the adapter's module names fit the base in {len(ways)} ways: "
                + "; ".join(rule.words for rule in ways.values()),
                remedy="Rename the adapter's keys to the base's names.",
            )
        )
    return winners[0]


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _unresolved(paths: Iterable[str], rule: NameRule, stored: Collection[str]) -> list[Problem]:
    known = sorted({name.removesuffix(".weight") for name in stored if name.endswith(".weight")})
    missing = [path for path in paths if f"{rule.to_disk(path, stored)}.weight" not in stored]
    problems = []
    for path in missing[:_SHOWN]:
        near = get_close_matches(rule.to_disk(path, stored), known, n=3, cutoff=0.5)
        problems.append(
            Problem(
                kind="unknown-module",
                loc=path,
                message="the base has no such module"
                + (f"; near names are {', '.join(near)}." if near else "; no name comes near it."),
                remedy="Use the base that the adapter was trained on; `adaptertool inspect` shows both.",
            )
        )
    if len(missing) > _SHOWN:
        problems.append(
            Problem(
                kind="unknown-module", message=f"and {len(missing) - _SHOWN} further modules of the adapter."
            )
        )
    return problems
